//! A shared folder as asked for, and what can be refused before anything is started.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::Transport;

/// The longest tag, in bytes (VIRTIO 1.2, section 5.11.4).
pub(super) const TAG_LENGTH: usize = 36;

/// A shared folder: `path=/srv/data,tag=data,readonly`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ShareSpec {
    /// The folder of the host's
    pub path: PathBuf,
    /// The name that the guest mounts it by (`mount -t virtiofs TAG FOLDER`), 1 to 36 bytes
    pub tag: String,
    /// Nobody in the guest can change anything in it
    pub readonly: bool,
    /// What the guest keeps of it: auto (for a second), always (as if nobody else changed it) or none
    #[arg(value_parser = kv::from_str::<Cache>)]
    pub cache: Cache,
    /// The device's name for later changes; the tag unless said
    pub id: Option<String>,
    /// How the guest finds it: pci, mmio or mmio-cmdline; as the machine's devices unless said
    #[arg(value_parser = kv::from_str::<Transport>)]
    pub transport: Option<Transport>,
}

/// What the guest keeps of a shared folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// Names and attributes for a second, data until the file is opened again.
    #[default]
    Auto,
    /// All of it, for ever.
    Always,
    /// Nothing.
    None,
}

impl Cache {
    /// As virtiofsd calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::None => "none",
        }
    }
}

impl ShareSpec {
    /// The name by which the device is addressed while the VM runs.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or(&self.tag)
    }

    /// Checks what can be checked without starting anything.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to say instead.
    pub fn validate(&self) -> anyhow::Result<()> {
        let (tag, path) = (&self.tag, self.path.display());
        if tag.is_empty() {
            bail!("A shared folder has a name for the guest: say tag=NAME");
        }
        if tag.len() > TAG_LENGTH || tag.contains('\0') {
            bail!("tag={} is not possible: it has 1 to {TAG_LENGTH} bytes, and none is 0", tag.escape_default());
        }
        if self.path.as_os_str().is_empty() {
            bail!("{tag}: there is no folder to share: say path=FOLDER");
        }
        let metadata = self.path.metadata().with_context(|| format!("{tag}: cannot share {path}: make that folder"))?;
        if !metadata.is_dir() {
            bail!("{tag}: cannot share {path}, which is no folder: name one");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> ShareSpec {
        kv::from_str(text).unwrap()
    }

    #[test]
    fn the_first_word_is_the_folder_and_the_tag_is_the_name() {
        let share = spec("/tmp,tag=data,readonly,cache=none");
        assert_eq!((share.id(), share.readonly, share.cache), ("data", true, Cache::None));
        share.validate().unwrap();
        assert_eq!(spec("tag=data,path=/tmp,id=share0").id(), "share0");
        spec(&format!("/tmp,tag={}", "é".repeat(18))).validate().unwrap();
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_way_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, cure) in [
            ("", "tag=NAME"),
            ("/tmp", "tag=NAME"),
            ("tag=data", "path=FOLDER"),
            ("/nonexistent/data,tag=data", "make that folder"),
            (&format!("{},tag=data", file.path().display()), "no folder: name one"),
            (&format!("/tmp,tag={}", "a".repeat(37)), "1 to 36"),
            ("/tmp,tag=a\0b", "1 to 36"),
        ] {
            let fault = format!("{:#}", spec(text).validate().unwrap_err());
            assert!(fault.contains(cure), "{text}: {fault}");
        }
        let fault = kv::from_str::<ShareSpec>("/tmp,tag=data,ro").unwrap_err().to_string();
        assert!(fault.contains("readonly"), "{fault}");
    }
}
