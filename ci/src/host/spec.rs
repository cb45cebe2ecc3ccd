//! What the emulated host is to run, written into its initramfs as small files, so that names and arguments may be any
//! bytes.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use guest::initramfs::Archive;

/// One command, and where and how to run it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Spec {
    /// The program and its arguments.
    pub(crate) arguments: Vec<OsString>,
    /// The whole environment.
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// The working directory.
    pub(crate) directory: PathBuf,
    /// The directory that holds the kernel's `lib/modules`.
    pub(crate) modules: PathBuf,
    /// The terminal that standard input is, if it is one.
    pub(crate) terminal: Option<Terminal>,
}

/// A terminal's size, and which streams besides standard input are it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terminal {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
}

impl Spec {
    /// Adds the files to the initramfs.
    pub(crate) fn write(&self, archive: &mut Archive) -> Result<()> {
        let mut environment = Vec::new();
        for (name, value) in &self.environment {
            environment.push([name.as_bytes(), b"=", value.as_bytes()].concat());
        }
        let terminal = self.terminal.map(|terminal| {
            let Terminal { rows, columns, stdout, stderr } = terminal;
            format!("{rows} {columns} {stdout} {stderr}")
        });
        archive.file("spec/arguments", 0o600, &join(self.arguments.iter().map(|word| word.as_bytes())))?;
        archive.file("spec/environment", 0o600, &join(environment.iter().map(Vec::as_slice)))?;
        archive.file("spec/directory", 0o600, self.directory.as_os_str().as_bytes())?;
        archive.file("spec/modules", 0o600, self.modules.as_os_str().as_bytes())?;
        Ok(archive.file("spec/terminal", 0o600, terminal.unwrap_or_default().as_bytes())?)
    }

    /// Reads the files back, under `root`.
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let file = |name: &str| {
            fs::read(root.join("spec").join(name)).with_context(|| format!("Cannot read the specified {name}"))
        };
        let path = |name| Ok::<_, anyhow::Error>(PathBuf::from(OsString::from_vec(file(name)?)));
        let mut environment = Vec::new();
        for variable in split(&file("environment")?) {
            let equals = variable.iter().position(|byte| *byte == b'=').context("A variable has no value")?;
            environment.push((text(&variable[..equals]), text(&variable[equals + 1..])));
        }
        Ok(Self {
            arguments: split(&file("arguments")?).map(text).collect(),
            environment,
            directory: path("directory")?,
            modules: path("modules")?,
            terminal: terminal(&String::from_utf8(file("terminal")?)?)?,
        })
    }
}

fn terminal(words: &str) -> Result<Option<Terminal>> {
    let words: Vec<&str> = words.split_whitespace().collect();
    if words.is_empty() {
        return Ok(None);
    }
    ensure!(words.len() == 4, "The specified terminal is damaged");
    Ok(Some(Terminal {
        rows: words[0].parse()?,
        columns: words[1].parse()?,
        stdout: words[2].parse()?,
        stderr: words[3].parse()?,
    }))
}

fn join<'a>(words: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    words.flat_map(|word| word.iter().copied().chain([0])).collect()
}

fn split(words: &[u8]) -> impl Iterator<Item = &[u8]> {
    words.split_inclusive(|byte| *byte == 0).map(|word| word.strip_suffix(&[0]).unwrap_or(word))
}

fn text(bytes: &[u8]) -> OsString {
    OsStr::from_bytes(bytes).to_owned()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_command_of_odd_bytes_comes_back_from_the_archive() {
        let spec = Spec {
            arguments: ["printf", "", "a b\n", "ä"]
                .map(OsString::from)
                .into_iter()
                .chain([text(&[0xff, b'='])])
                .collect(),
            environment: vec![("A".into(), "=\n".into()), ("EMPTY".into(), "".into())],
            directory: "/tmp/with space".into(),
            modules: "/cache".into(),
            terminal: Some(Terminal { rows: 24, columns: 80, stdout: true, stderr: false }),
        };
        let mut archive = Archive::default();
        spec.write(&mut archive).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("archive");
        fs::write(&file, archive.finish().unwrap()).unwrap();
        let status = Command::new("cpio")
            .args(["--extract", "--make-directories", "--quiet"])
            .current_dir(directory.path())
            .stdin(Stdio::from(fs::File::open(file).unwrap()))
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!(Spec::read(directory.path()).unwrap(), spec);
    }
}
