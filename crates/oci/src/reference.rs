//! What an image is called: a folder or an archive of this host's, or a name at a registry.
//!
//! Registries' names follow the distribution specification 1.1, "Pulling manifests", as oci-client reads them, but that the
//! host is always said: nothing is looked up at a registry that nobody named.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, bail, ensure};
use oci_client::Reference as Name;

/// A reference is no novel.
const MOST_BYTES: usize = 4096;

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A folder or an archive on this host.
    Local(Local),
    /// `HOST[:PORT]/NAME[:TAG|@DIGEST]`.
    Registry(Name),
}

/// An image on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// What kind of thing is there; what is in it says it unless it was said.
    pub kind: Option<Kind>,
    /// The folder or file.
    pub path: PathBuf,
    /// Which of its images; needed if there are several.
    pub tag: Option<String>,
}

/// How images lie on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder as the image layout specification has it.
    Layout,
    /// The same as a tar archive.
    OciArchive,
    /// What `docker save` and `podman save` write.
    DockerArchive,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Layout, Self::OciArchive, Self::DockerArchive];

    /// The word before the colon, as container tools have it.
    fn word(self) -> &'static str {
        match self {
            Self::Layout => "oci",
            Self::OciArchive => "oci-archive",
            Self::DockerArchive => "docker-archive",
        }
    }
}

impl FromStr for Reference {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        ensure!(text.len() <= MOST_BYTES, "the reference is too long: {MOST_BYTES} bytes are the most");
        ensure!(!text.chars().any(char::is_control), "the reference has control characters in it: check it");
        for kind in Kind::ALL {
            if let Some(rest) = text.strip_prefix(kind.word()).and_then(|rest| rest.strip_prefix(':')) {
                let (path, tag) = match rest.split_once(':') {
                    Some((path, tag)) => (path, Some(tag.to_owned())),
                    None => (rest, None),
                };
                ensure!(!path.is_empty() && tag.as_deref() != Some(""), "{text:?}: say {}:PATH[:TAG]", kind.word());
                return Ok(Self::Local(Local { kind: Some(kind), path: path.into(), tag }));
            }
        }
        if text.starts_with(['/', '.']) {
            return Ok(Self::Local(Local { kind: None, path: text.into(), tag: None }));
        }
        let host = text.split_once('/').map(|(host, _)| host);
        let says_host = host.is_some_and(|host| host == "localhost" || host.contains(['.', ':']));
        if !says_host && Path::new(text).exists() {
            bail!("{text:?} is no reference: say ./{text} for the file or folder");
        }
        ensure!(says_host, "{text:?} does not say which registry: say HOST/{text}, or ./{text} for a file or folder");
        let name: Name = text.parse().with_context(|| format!("{text:?} is no name of an image: say HOST/NAME:TAG"))?;
        // The library looks some names up under other ones.
        ensure!(host == Some(name.registry()), "{text:?} is no name of an image: say HOST/NAME:TAG");
        Ok(Self::Registry(name))
    }
}

impl Reference {
    /// The same from any folder.
    ///
    /// # Errors
    ///
    /// There is no such file or folder.
    pub fn absolute(self) -> anyhow::Result<Self> {
        let Self::Local(local) = self else { return Ok(self) };
        let path = local.path.canonicalize();
        let path = path.with_context(|| format!("there is no image at {}: check the path", local.path.display()))?;
        Ok(Self::Local(Local { path, ..local }))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Local(Local { kind, path, tag }) = self else {
            let Self::Registry(name) = self else { return Ok(()) };
            return write!(f, "{}", name.whole());
        };
        if let Some(kind) = kind {
            write!(f, "{}:", kind.word())?;
        }
        write!(f, "{}", path.display())?;
        tag.iter().try_for_each(|tag| write!(f, ":{tag}"))
    }
}

/// Whether a registry is this host, with which nothing needs to be encrypted.
pub(crate) fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let host = host.map_or(registry, |(host, _)| host).trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(kind: Option<Kind>, path: &str, tag: Option<&str>) -> Reference {
        Reference::Local(Local { kind, path: path.into(), tag: tag.map(str::to_owned) })
    }

    #[test]
    fn folders_and_archives_are_said_as_container_tools_say_them_or_by_their_path() {
        let parse = |text: &str| text.parse::<Reference>().unwrap();
        assert_eq!(parse("oci:/srv/image"), local(Some(Kind::Layout), "/srv/image", None));
        assert_eq!(parse("oci:image:v1"), local(Some(Kind::Layout), "image", Some("v1")));
        assert_eq!(parse("oci-archive:a.tar:v1"), local(Some(Kind::OciArchive), "a.tar", Some("v1")));
        assert_eq!(parse("docker-archive:a.tar:n/m:v1"), local(Some(Kind::DockerArchive), "a.tar", Some("n/m:v1")));
        assert_eq!(parse("./a.tar"), local(None, "./a.tar", None));
        for text in ["oci:/srv/image:v1", "/srv/image", "docker-archive:/a.tar"] {
            assert_eq!(parse(text).to_string(), text);
        }
    }

    #[test]
    fn a_registry_is_always_named() {
        let digest = format!("registry.example/n@sha256:{}", "a".repeat(64));
        for (text, whole) in [
            ("registry.example/a/b", "registry.example/a/b:latest"),
            ("localhost/a:v1", "localhost/a:v1"),
            ("127.0.0.1:5000/a:v1", "127.0.0.1:5000/a:v1"),
            (digest.as_str(), digest.as_str()),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), whole);
        }
        for text in ["debian", "library/debian:12", "debian:12", ""] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains("say HOST/"), "{text}: {error}");
        }
        let error = "src".parse::<Reference>().unwrap_err().to_string();
        assert!(error.contains("say ./src"), "what is there is most likely meant: {error}");
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long = "a".repeat(MOST_BYTES + 1);
        for text in ["oci:", "oci:a:", "registry.example/UPPER", "registry.example/a:b:c", "a.b/c\n", &long] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_this_host_is_spoken_to_in_the_clear() {
        for host in ["localhost", "localhost:5000", "127.0.0.1", "127.1.2.3:80", "[::1]:5000", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["registry.example", "localhost.example:80", "10.0.0.1:5000", "127.0.0.1.example"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
