//! What the command of a machine in the background writes: both streams in one file, in frames that say which, and
//! bounded, since a guest can write for ever.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use guest::frame::{self, Decoder, Frame, Kind};

/// After so many bytes a new file begins, and of the earlier ones one is kept.
const MOST: u64 = 8 << 20;

/// The file to write to.
pub struct OutputLog {
    path: PathBuf,
    file: File,
    size: u64,
}

impl OutputLog {
    /// Makes the file.
    ///
    /// # Errors
    ///
    /// It cannot be made, or is there.
    pub fn create(path: PathBuf) -> anyhow::Result<Self> {
        let file = create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path, file, size: 0 })
    }

    /// Appends what a stream brought.
    pub fn write(&mut self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        if self.size > MOST {
            fs::rename(&self.path, earlier(&self.path))?;
            (self.file, self.size) = (create(&self.path)?, 0);
        }
        frame::write_frame(&mut self.file, kind, bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create_new(true).append(true).mode(0o600).open(path)
}

/// The file that was full.
fn earlier(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// The file to read from while it is written to.
pub struct Reader {
    path: PathBuf,
    file: Option<File>,
    decoder: Decoder,
}

impl Reader {
    /// From the first frame that there still is.
    pub fn open(path: PathBuf) -> Self {
        let file = File::open(earlier(&path)).or_else(|_| File::open(&path)).ok();
        Self { path, file, decoder: Decoder::default() }
    }

    /// The next frame, if it has been written by now.
    pub fn read(&mut self) -> io::Result<Option<Frame>> {
        let mut buffer = vec![0; frame::MOST_PAYLOAD];
        loop {
            if let Some(frame) = self.decoder.next()? {
                return Ok(Some(frame));
            }
            let Some(file) = &mut self.file else {
                self.file = match File::open(&self.path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    file => Some(file?),
                };
                continue;
            };
            match file.read(&mut buffer)? {
                0 if !self.move_on()? => return Ok(None),
                read => self.decoder.feed(&buffer[..read]),
            }
        }
    }

    /// Whether another file was begun after this one; then that is read from now on. Before it was begun this one was
    /// written to its end.
    fn move_on(&mut self) -> io::Result<bool> {
        let Some(file) = &mut self.file else { return Ok(false) };
        let ours = file.metadata()?;
        let newest = match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            newest => newest?,
        };
        if (ours.dev(), ours.ino()) == (newest.dev(), newest.ino()) {
            return Ok(false);
        }
        let mut rest = Vec::new();
        file.read_to_end(&mut rest)?;
        self.decoder.feed(&rest);
        self.file = Some(File::open(&self.path)?);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut Reader) -> Vec<(Kind, Vec<u8>)> {
        std::iter::from_fn(|| reader.read().unwrap()).map(|frame| (frame.kind, frame.payload)).collect()
    }

    #[test]
    fn what_was_written_is_read_stream_by_stream_also_while_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("output.log");
        let mut reader = Reader::open(path.clone());
        assert_eq!(all(&mut reader), []);
        let mut log = OutputLog::create(path).unwrap();
        log.write(Kind::Stdout, b"one").unwrap();
        log.write(Kind::Stderr, b"two").unwrap();
        assert_eq!(all(&mut reader), [(Kind::Stdout, b"one".to_vec()), (Kind::Stderr, b"two".to_vec())]);
        log.write(Kind::Stdout, b"three").unwrap();
        assert_eq!(all(&mut reader), [(Kind::Stdout, b"three".to_vec())]);
    }

    #[test]
    fn a_command_that_writes_for_ever_fills_two_files_and_who_follows_misses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("output.log");
        let mut log = OutputLog::create(path.clone()).unwrap();
        let mut follower = Reader::open(path.clone());
        let (mut followed, mut written) = (0, 0u64);
        while written < 3 * MOST {
            log.write(Kind::Stdout, &[7; frame::MOST_PAYLOAD]).unwrap();
            written += frame::MOST_PAYLOAD as u64;
            followed += all(&mut follower).iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        }
        assert_eq!(followed, written);
        let kept: u64 =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(kept < 2 * MOST + (1 << 20), "{kept}");
        let late: usize = all(&mut Reader::open(path)).iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(late as u64 >= MOST, "{late}");
    }
}
