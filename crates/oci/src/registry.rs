//! Images at a registry (distribution specification 1.1, "Pull"), which may hang, fail, stop in the middle and lie.
//!
//! oci-client speaks to it. It reads manifests and errors whole, however long they are; so the process may have no more than
//! [`MOST_MEMORY`] for it, and ends if a registry makes it try.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use futures_util::StreamExt as _;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::{Client, Reference};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;

use crate::blob::{self, Claim, Digest, NoRoom};
use crate::login::Login;
use crate::manifest::{MEDIA_TYPES, MOST_BYTES};
use crate::reference::is_loopback;
use crate::source::{Document, Image, follow};

/// What the process may have more of while it speaks to a registry, in bytes.
const MOST_MEMORY: u64 = 256 << 20;
/// A transfer that got so far before it broke off may try as often as one that has just begun.
const PROGRESS: u64 = 4 << 20;

/// How long a registry is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// For the next bytes.
    pub silence: Duration,
    /// For all of a manifest.
    pub manifest: Duration,
    /// Before the second try; twice as long before the third, and so on.
    pub pause: Duration,
    /// How often something is tried.
    pub tries: u32,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { connect: seconds(10), silence: seconds(20), manifest: seconds(60), pause: seconds(1), tries: 4 }
    }
}

/// An image at a registry.
pub(crate) struct Registry {
    client: Client,
    name: Reference,
    login: Login,
    runtime: Runtime,
    patience: Patience,
}

/// Why a try has failed.
enum Trouble {
    /// The next one may not.
    Passing(anyhow::Error),
    /// So would the next one.
    Lasting(anyhow::Error),
}

impl Registry {
    pub(crate) fn new(name: &Reference, patience: Patience) -> anyhow::Result<Self> {
        Self::with(name, Login::of_user(name.registry(), name.repository())?, patience)
    }

    fn with(name: &Reference, login: Login, patience: Patience) -> anyhow::Result<Self> {
        // It fails if it was done before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain = is_loopback(name.registry());
        let direct = || plain.then(|| "http://127.0.0.1".to_owned());
        let client = Client::try_from(ClientConfig {
            protocol: if plain { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(patience.connect),
            read_timeout: Some(patience.silence),
            user_agent: concat!("vmm-oci/", env!("CARGO_PKG_VERSION")),
            // This host is reached without the proxy that the environment may name.
            http_proxy: direct(),
            no_proxy: plain.then(|| "localhost,127.0.0.0/8,::1".to_owned()),
            ..ClientConfig::default()
        })
        .context("cannot prepare for TLS")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot prepare for waiting")?;
        Ok(Self { client, name: name.clone(), login, runtime, patience })
    }

    /// What the image consists of.
    pub(crate) fn image(&self) -> anyhow::Result<Image> {
        let start = self.manifest(&self.name)?;
        follow(&start, None, |document, claim| {
            let digest = claim.digest.context("a blob has no digest")?;
            let bytes = match document {
                Document::Manifest => self.manifest(&self.name.clone_with_digest(digest.to_string()))?,
                Document::Config => {
                    ensure!(claim.size <= MOST_BYTES, "the configuration has {} bytes", claim.size);
                    let mut bytes = Vec::new();
                    self.fetch(&claim, None)?.read_to_end(&mut bytes).map_err(NoRoom)?;
                    bytes
                }
            };
            blob::read(&*bytes, &claim, MOST_BYTES)
        })
    }

    /// Fetches a blob into a file without a name in `folder`, or else where temporary files are.
    pub(crate) fn fetch(&self, claim: &Claim, folder: Option<&Path>) -> anyhow::Result<File> {
        let mut file = folder.map_or_else(tempfile::tempfile, tempfile::tempfile_in).map_err(NoRoom)?;
        let digest = claim.digest.context("a blob has no digest")?;
        let mut have = 0;
        let mut tries = 0;
        self.bounded(async || {
            loop {
                let before = have;
                match self.transfer(&digest.to_string(), claim.size, &mut file, &mut have).await {
                    Ok(()) => return Ok(()),
                    Err(trouble) => {
                        if have.saturating_sub(before) >= PROGRESS {
                            tries = 0;
                        }
                        self.pause(&mut tries, trouble).await?;
                    }
                }
            }
        })
        .with_context(|| format!("cannot fetch {digest} from {}", self.name.registry()))?;
        file.rewind().map_err(NoRoom)?;
        Ok(file)
    }

    /// Fetches the rest of a blob.
    async fn transfer(&self, digest: &str, size: u64, file: &mut File, have: &mut u64) -> Result<(), Trouble> {
        if *have == size {
            return Ok(());
        }
        let rest = Some(size - *have);
        let answer = self.client.pull_blob_stream_partial(&self.name, digest, *have, rest).await;
        let mut stream = match answer.map_err(|error| self.judge(error))? {
            BlobResponse::Partial(stream) => stream.stream,
            // It knows nothing of parts: this is all of it.
            BlobResponse::Full(stream) => {
                *have = 0;
                stream.stream
            }
        };
        let no_room = |error| Trouble::Lasting(NoRoom(error).into());
        file.seek(SeekFrom::Start(*have)).map_err(no_room)?;
        while *have < size {
            let Some(bytes) = stream.next().await else {
                return Err(Trouble::Passing(anyhow!("it stopped after {have} of {size} bytes")));
            };
            let bytes = bytes.map_err(|error| {
                Trouble::Passing(anyhow!("it broke off after {have} of {size} bytes: {}", root_cause(&error)))
            })?;
            let fits = bytes.len() as u64 <= size - *have;
            if !fits {
                return Err(Trouble::Lasting(anyhow!("it has more than the {size} bytes that its descriptor says")));
            }
            file.write_all(&bytes).map_err(no_room)?;
            *have += bytes.len() as u64;
        }
        Ok(())
    }

    /// Fetches a manifest.
    fn manifest(&self, name: &Reference) -> anyhow::Result<Vec<u8>> {
        let mut tries = 0;
        let bytes = self.bounded(async || {
            loop {
                let answer = self.client.pull_manifest_raw(name, &self.login.auth, &MEDIA_TYPES);
                let trouble = match tokio::time::timeout(self.patience.manifest, answer).await {
                    Ok(Ok((bytes, _))) => return Ok(bytes),
                    Ok(Err(error)) => self.judge(error),
                    Err(_) => Trouble::Passing(anyhow!("it took longer than {:?}", self.patience.manifest)),
                };
                self.pause(&mut tries, trouble).await?;
            }
        });
        let bytes = bytes.with_context(|| format!("cannot fetch the manifest of {name}"))?;
        ensure!(bytes.len() as u64 <= MOST_BYTES, "the manifest of {name} has more than {MOST_BYTES} bytes");
        if let Some(digest) = name.digest() {
            let found = Digest::of(&bytes);
            ensure!(digest.parse().ok() == Some(found), "the manifest of {name} has the digest {found}");
        }
        Ok(bytes.to_vec())
    }

    /// Waits before the next try, if there is one.
    async fn pause(&self, tries: &mut u32, trouble: Trouble) -> anyhow::Result<()> {
        let error = match trouble {
            Trouble::Lasting(error) => return Err(error),
            Trouble::Passing(error) => error,
        };
        *tries += 1;
        if *tries >= self.patience.tries {
            return Err(error.context(format!("given up after {tries} tries")));
        }
        tokio::time::sleep(self.patience.pause * (1 << (*tries - 1).min(8))).await;
        Ok(())
    }

    /// Whether it is worth another try.
    fn judge(&self, error: OciDistributionError) -> Trouble {
        match error {
            OciDistributionError::ServerError { code, .. } if code >= 500 || code == 429 => {
                Trouble::Passing(anyhow!("the registry answers with status {code}"))
            }
            OciDistributionError::ServerError { code: 404, .. } => Trouble::Lasting(anyhow!("there is no such image")),
            OciDistributionError::ServerError { code, .. } => {
                Trouble::Lasting(anyhow!("the registry answers with status {code}"))
            }
            OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
                Trouble::Lasting(anyhow!("the registry wants a login or has no such image: {}", self.login.hint))
            }
            OciDistributionError::ImageManifestNotFoundError(_) => Trouble::Lasting(anyhow!("there is no such image")),
            OciDistributionError::RegistryError { envelope, .. } => {
                let codes = envelope.errors.iter().map(|error| format!("{:?}", error.code)).take(5);
                Trouble::Lasting(anyhow!("the registry refuses: {}", codes.collect::<Vec<_>>().join(", ")))
            }
            OciDistributionError::RequestError(error) => Trouble::Passing(anyhow!("{}", root_cause(&error))),
            OciDistributionError::IoError(error) => Trouble::Passing(error.into()),
            error => Trouble::Lasting(anyhow!("{}", clean(&error.to_string()))),
        }
    }

    /// Runs `work`, which has no more than so much memory.
    fn bounded<T>(&self, work: impl AsyncFnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let before = getrlimit(Resource::Data);
        let most = memory()?.saturating_add(MOST_MEMORY);
        let current = Some(before.current.map_or(most, |current| current.min(most)));
        setrlimit(Resource::Data, Rlimit { current, ..before }).context("cannot limit the memory")?;
        let result = self.runtime.block_on(work());
        setrlimit(Resource::Data, before).context("cannot limit the memory")?;
        result
    }
}

/// How many bytes the process has that count towards the limit (/proc/PID/statm, the sixth column; proc(5)).
fn memory() -> anyhow::Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").context("cannot read /proc/self/statm")?;
    let pages: Option<u64> = statm.split(' ').nth(5).and_then(|pages| pages.parse().ok());
    let page = rustix::param::page_size() as u64;
    Ok(pages.context("/proc/self/statm is not understood")?.saturating_mul(page))
}

/// What went wrong at the bottom, without the addresses that each level repeats.
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    clean(&cause.to_string())
}

/// Others' words, for people.
fn clean(text: &str) -> String {
    text.chars().take(300).collect::<String>().replace(char::is_control, " ")
}

#[cfg(test)]
mod tests;
