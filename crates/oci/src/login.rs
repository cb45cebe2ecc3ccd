//! Who we are at a registry: the logins that container tools have written (containers-auth.json(5), and Docker's
//! config.json).
//!
//! Left out on purpose: credential helpers, which are programs that a file would have us run.

use std::collections::HashMap;
use std::env;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;

/// The most bytes of such a file.
const MOST_BYTES: u64 = 1 << 20;

/// A login, or why there is none.
pub(crate) struct Login {
    pub(crate) auth: RegistryAuth,
    /// For whoever is not let in.
    pub(crate) hint: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Logins {
    auths: HashMap<String, Auth>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
}

impl Login {
    /// The user's login for an image.
    ///
    /// # Errors
    ///
    /// A file of logins is not understood.
    pub(crate) fn of_user(registry: &str, repository: &str) -> anyhow::Result<Self> {
        Self::find(
            &files(|name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)),
            registry,
            repository,
        )
    }

    /// The first one in `files`.
    fn find(files: &[PathBuf], registry: &str, repository: &str) -> anyhow::Result<Self> {
        let mut hint = format!("`podman login {registry}` writes a login that is read here");
        for path in files {
            let Some(logins) = read(path)? else { continue };
            if let Some(auth) = logins.find(registry, repository) {
                let auth = decode(auth)
                    .with_context(|| format!("the login for {registry} in {} is damaged", path.display()))?;
                return Ok(Self { auth, hint: format!("the login in {} is not enough", path.display()) });
            }
            let helper = logins.cred_helpers.get(registry).or(logins.creds_store.as_ref());
            if helper.is_some() {
                hint = format!("{} has a helper for logins, which is not run here; {hint}", path.display());
            }
        }
        Ok(Self { auth: RegistryAuth::Anonymous, hint })
    }
}

/// Where logins are, the first one first.
fn files(folder: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(file) = folder("REGISTRY_AUTH_FILE") {
        return vec![file];
    }
    let home = || folder("HOME");
    let config = folder("XDG_CONFIG_HOME").or_else(|| Some(home()?.join(".config")));
    let docker = folder("DOCKER_CONFIG").or_else(|| Some(home()?.join(".docker")));
    let all = [
        folder("XDG_RUNTIME_DIR").map(|folder| folder.join("containers/auth.json")),
        config.map(|folder| folder.join("containers/auth.json")),
        docker.map(|folder| folder.join("config.json")),
    ];
    all.into_iter().flatten().collect()
}

fn read(path: &Path) -> anyhow::Result<Option<Logins>> {
    let shown = path.display();
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.with_context(|| format!("cannot read {shown}"))?,
    };
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {shown}"))?;
    ensure!(bytes.len() as u64 <= MOST_BYTES, "{shown} has more than {MOST_BYTES} bytes");
    // What serde says of it could quote a secret.
    serde_json::from_slice(&bytes)
        .map(Some)
        .ok()
        .with_context(|| format!("{shown} is no file of logins: mend or remove it"))
}

impl Logins {
    /// The login for an image: of its repository, of what is above that, and so on to the registry.
    fn find(&self, registry: &str, repository: &str) -> Option<&str> {
        let mut name = format!("{registry}/{repository}");
        loop {
            let same = |key: &&String| key.as_str() == name || (name == registry && host(key) == registry);
            let key = self.auths.keys().find(same);
            if let Some(auth) = key.and_then(|key| self.auths[key].auth.as_deref()).filter(|auth| !auth.is_empty()) {
                return Some(auth);
            }
            name.truncate(name.rfind('/')?);
        }
    }
}

/// The host in a key as Docker writes it: `https://HOST/v1/`.
fn host(key: &str) -> &str {
    let Some((_, rest)) = key.split_once("://") else { return key };
    rest.split('/').next().unwrap_or_default()
}

fn decode(auth: &str) -> anyhow::Result<RegistryAuth> {
    let text = STANDARD.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let (user, password) =
        text.as_deref().and_then(|text| text.split_once(':')).context("it is no NAME:PASSWORD in base64")?;
    // Docker pads passwords with zero bytes.
    Ok(RegistryAuth::Basic(user.to_owned(), password.trim_end_matches('\0').to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn basic(user: &str, password: &str) -> RegistryAuth {
        RegistryAuth::Basic(user.into(), password.into())
    }

    fn find(text: &str, registry: &str, repository: &str) -> anyhow::Result<Login> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("auth.json");
        fs::write(&path, text).unwrap();
        Login::find(&[folder.path().join("missing"), path], registry, repository)
    }

    #[test]
    fn the_login_that_names_the_image_best_is_taken() {
        let text = format!(
            r#"{{"auths": {{"r.example": {{"auth": "{}"}}, "r.example/a/b": {{"auth": "{}"}}, "https://d.example/v1/": {{"auth": "{}"}}}}}}"#,
            STANDARD.encode("all:1"),
            STANDARD.encode("some:2:3"),
            STANDARD.encode("old:4\0\0")
        );
        let auth = |registry, repository| find(&text, registry, repository).unwrap().auth;
        assert_eq!(auth("r.example", "a/b/c"), basic("some", "2:3"));
        assert_eq!(auth("r.example", "a/c"), basic("all", "1"));
        assert_eq!(auth("d.example", "a"), basic("old", "4"));
        assert_eq!(auth("other.example", "r.example/a/b"), RegistryAuth::Anonymous);
    }

    #[test]
    fn a_helper_is_not_run_but_named() {
        let login = find(r#"{"credHelpers": {"r.example": "secret"}}"#, "r.example", "a").unwrap();
        assert!(login.auth == RegistryAuth::Anonymous && login.hint.contains("not run"), "{}", login.hint);
    }

    #[test]
    fn a_damaged_file_is_named_and_its_secrets_are_not() {
        for text in ["secret", r#"{"auths": "secret"}"#, r#"{"auths": {"r.example": {"auth": "secret?"}}}"#] {
            let error = format!("{:#}", find(text, "r.example", "a").err().unwrap());
            assert!(error.contains("auth.json") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn logins_are_looked_for_where_container_tools_keep_them() {
        let with = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            files(move |name| names.iter().any(|other| other == name).then(|| format!("/{name}").into()))
        };
        assert_eq!(with(&["REGISTRY_AUTH_FILE", "HOME"]), [PathBuf::from("/REGISTRY_AUTH_FILE")]);
        let of_home = ["/HOME/.config/containers/auth.json", "/HOME/.docker/config.json"].map(PathBuf::from);
        assert_eq!(with(&["HOME"]), of_home);
        assert_eq!(with(&["HOME", "XDG_RUNTIME_DIR"])[0], PathBuf::from("/XDG_RUNTIME_DIR/containers/auth.json"));
    }
}
