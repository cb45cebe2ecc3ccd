//! Roots that are file systems: an image that `vmm-oci` gets ready, and a disk.
//!
//! `vmm-oci` is a program of its own, because what it takes to speak to registries is heavier than all of `vmm`.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

use crate::cli::companion;
use crate::exit::Usage;

/// The program's name.
const PROGRAM: &str = "vmm-oci";
/// The most bytes of its answer.
const MOST_BYTES: u64 = 8 << 20;

/// An image that is ready to use.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Image {
    /// The file system image.
    pub(super) path: PathBuf,
    #[serde(rename = "digest")]
    _digest: String,
    /// What runs in it.
    pub(super) config: Config,
}

/// What an image says of its command, with the names that the image specification has.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub(super) struct Config {
    pub(super) entrypoint: Option<Vec<String>>,
    pub(super) cmd: Option<Vec<String>>,
    pub(super) env: Option<Vec<String>>,
    pub(super) user: Option<String>,
    pub(super) working_dir: Option<String>,
}

/// What `vmm-oci` answers.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Answer {
    Image(Image),
    Error(String),
}

impl Config {
    /// The command: what is given stands in place of the image's own, and after its entry point.
    pub(super) fn argv(&self, entrypoint: Option<&str>, command: &[String]) -> anyhow::Result<Vec<String>> {
        let mut argv = match entrypoint {
            Some(program) => vec![program.to_owned()],
            None => self.entrypoint.clone().unwrap_or_default(),
        };
        // The image's command is for its own entry point.
        let own = self.cmd.as_deref().filter(|_| entrypoint.is_none()).unwrap_or_default();
        argv.extend_from_slice(if command.is_empty() { own } else { command });
        ensure!(!argv.is_empty(), "the image does not say what runs in it: say `-- COMMAND`");
        Ok(argv)
    }

    /// Its variables; what is no variable is none.
    pub(super) fn env(&self) -> impl Iterator<Item = (String, String)> {
        let variables = self.env.iter().flatten().filter_map(|variable| variable.split_once('='));
        variables.filter(|(name, _)| !name.is_empty()).map(|(name, value)| (name.to_owned(), value.to_owned()))
    }
}

/// Gets an image ready, which may take as long as fetching it.
pub(super) fn get(reference: &str) -> anyhow::Result<Image> {
    let mut command = Command::new(companion::find(PROGRAM)?);
    command.args(["get", "--", reference]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {PROGRAM}"))?;
    let mut answer = Vec::new();
    let output = child.stdout.take().context("vmm-oci has no output")?;
    output.take(MOST_BYTES).read_to_end(&mut answer).with_context(|| format!("cannot read what {PROGRAM} says"))?;
    let status = child.wait().with_context(|| format!("cannot wait for {PROGRAM}"))?;
    match serde_json::from_slice(&answer) {
        Ok(Answer::Image(image)) if status.success() => Ok(image),
        Ok(Answer::Error(message)) => bail!("{}", message.replace(char::is_control, " ")),
        _ if !status.success() => {
            bail!("{PROGRAM} has failed ({status}) at {reference}: an image may be too much for it")
        }
        _ => bail!("{PROGRAM} is not this vmm's: install both from the same source"),
    }
}

/// Where file systems have their magic numbers: the offset, the bytes, and what Linux calls it.
const MAGIC: [(u64, &[u8], &str); 5] = [
    (0x438, &[0x53, 0xef], "ext4"),
    (0, b"hsqs", "squashfs"),
    (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "erofs"),
    (0, b"XFSB", "xfs"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
];

/// Which file system a raw image holds.
pub(super) fn file_system(path: &Path) -> anyhow::Result<&'static str> {
    let shown = path.display();
    // A pipe would keep us waiting for its other end.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file =
        file.map_err(|error| Usage(format!("cannot open the disk {shown} ({error}): check its path and mode")))?;
    let has = |offset: u64, magic: &[u8]| {
        let mut found = vec![0; magic.len()];
        file.read_exact_at(&mut found, offset).is_ok() && found == magic
    };
    let known = MAGIC.iter().find(|(offset, magic, _)| has(*offset, magic)).map(|(_, _, name)| *name);
    known.with_context(|| {
        let names = MAGIC.map(|(_, _, name)| name).join(", ");
        format!("the disk {shown} holds no file system that is known here ({names}), or is divided into partitions")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_command_takes_the_place_of_the_images_own_and_an_entry_point_that_of_both() {
        let config = Config { entrypoint: Some(words("serve -v")), cmd: Some(words("all")), ..Config::default() };
        let argv = |entrypoint, command| config.argv(entrypoint, &words(command)).unwrap();
        assert_eq!(argv(None, ""), words("serve -v all"));
        assert_eq!(argv(None, "one two"), words("serve -v one two"));
        assert_eq!(argv(Some("sh"), ""), words("sh"));
        assert_eq!(argv(Some("sh"), "-c x"), words("sh -c x"));
        let nothing = Config::default();
        assert!(nothing.argv(None, &[]).unwrap_err().to_string().contains("COMMAND"));
        assert_eq!(nothing.argv(None, &words("true")).unwrap(), words("true"));
    }

    #[test]
    fn an_answer_that_this_vmm_does_not_know_is_no_image() {
        let known =
            r#"{"image": {"path": "/p", "digest": "d", "config": {"Cmd": ["a"], "Env": ["A=b=c", "x", "=y"]}}}"#;
        let Answer::Image(image) = serde_json::from_str(known).unwrap() else { panic!("it is an image") };
        assert_eq!(image.config.env().collect::<Vec<_>>(), [("A".to_owned(), "b=c".to_owned())]);
        for unknown in [known.replace("digest", "size"), known.replace("Cmd", "cmd"), "{}".into()] {
            assert!(serde_json::from_str::<Answer>(&unknown).is_err(), "{unknown}");
        }
    }

    #[test]
    fn a_disk_is_known_by_its_file_systems_magic_number() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (offset, magic, name) in MAGIC {
            file.as_file().set_len(0).unwrap();
            let error = file_system(file.path()).unwrap_err().to_string();
            assert!(error.contains("ext4, squashfs"), "{error}");
            file.as_file().write_all_at(magic, offset).unwrap();
            assert_eq!(file_system(file.path()).unwrap(), name);
        }
    }
}
