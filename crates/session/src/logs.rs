//! `vmm logs`: what the command of a machine in the background wrote, or what the guest said at its console.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use guest::frame::{Frame, Kind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use session::Machine;
use session::Reader;

/// What `vmm logs` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct LogsArgs {
    /// The machine
    name: String,
    /// Go on until the machine ends
    #[arg(short, long)]
    follow: bool,
    /// Of what there is by now, only so many lines
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,
    /// What the guest said at its console instead of what its command wrote
    #[arg(long)]
    console: bool,
}

/// How soon it is seen that a machine was killed, which no file tells.
const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

impl LogsArgs {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let machine = Machine::find(&self.name)?;
        let mut source = if self.console {
            Source::Text(machine.files().console(), None)
        } else {
            let path = machine.files().output();
            let elsewhere = machine.record.output.clone().filter(|_| !path.exists());
            ensure!(
                path.exists() || elsewhere.is_some(),
                "the command of {} writes to where it was started; what its console says: `vmm logs --console`",
                self.name
            );
            elsewhere.map_or_else(|| Source::Output(Reader::open(path)), |path| Source::Text(path, None))
        };
        // Before the first look, so that nothing comes between.
        let folder = match &source {
            Source::Text(path, _) => path.parent().unwrap_or(&machine.path),
            Source::Output(_) => &machine.path,
        };
        let changes = Changes::of(folder)?;
        let mut frames = source.all()?;
        if let Some(lines) = self.tail {
            frames = last(frames, lines);
        }
        for frame in frames {
            print(&frame)?;
        }
        if !self.follow {
            return Ok(ExitCode::SUCCESS);
        }
        loop {
            let alive = machine.is_alive();
            for frame in source.all()? {
                print(&frame)?;
            }
            if !alive {
                return Ok(ExitCode::SUCCESS);
            }
            changes.wait()?;
        }
    }
}

/// Where the lines come from.
enum Source {
    Output(Reader),
    /// A file without frames, and that at the place up to which it was seen.
    Text(PathBuf, Option<File>),
}

impl Source {
    /// What was written since the last time.
    fn all(&mut self) -> anyhow::Result<Vec<Frame>> {
        match self {
            Self::Output(reader) => {
                let mut frames = Vec::new();
                while let Some(frame) = reader.read()? {
                    frames.push(frame);
                }
                Ok(frames)
            }
            Self::Text(path, file) => {
                if file.is_none() {
                    *file = File::open(&*path).ok();
                }
                let mut payload = Vec::new();
                if let Some(file) = file {
                    file.read_to_end(&mut payload)?;
                }
                Ok(vec![Frame { kind: Kind::Stdout, payload }])
            }
        }
    }
}

fn print(frame: &Frame) -> io::Result<()> {
    match frame.kind {
        Kind::Stderr => io::stderr().write_all(&frame.payload),
        _ => io::stdout().write_all(&frame.payload).and_then(|()| io::stdout().flush()),
    }
}

/// The last lines of all streams together.
fn last(frames: Vec<Frame>, lines: usize) -> Vec<Frame> {
    let mut kept: VecDeque<Frame> = frames.into();
    let ends = |frame: &Frame| frame.payload.iter().filter(|byte| **byte == b'\n').count();
    let mut excess = kept.iter().map(ends).sum::<usize>().saturating_sub(lines);
    while excess > 0 {
        let Some(first) = kept.front_mut() else { break };
        let here = ends(first);
        // What follows the last line's end is of the next line.
        if here < excess || (here == excess && first.payload.ends_with(b"\n")) {
            excess -= here;
            kept.pop_front();
        } else {
            let cut = first.payload.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(excess - 1);
            let cut = cut.map_or(0, |(at, _)| at + 1);
            first.payload.drain(..cut);
            excess = 0;
        }
    }
    kept.into()
}

/// Tells when something is written into a folder's files.
struct Changes(OwnedFd);

impl Changes {
    fn of(folder: &Path) -> anyhow::Result<Self> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).context("cannot watch files")?;
        let what = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE_SELF;
        inotify::add_watch(&watch, folder, what).with_context(|| format!("cannot watch {}", folder.display()))?;
        Ok(Self(watch))
    }

    fn wait(&self) -> anyhow::Result<()> {
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&PATIENCE)).context("cannot wait")?;
        let mut events = [0; 4096];
        while rustix::io::read(&self.0, &mut events).is_ok_and(|read| read > 0) {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_counted_over_both_streams() {
        let frame = |kind, text: &str| Frame { kind, payload: text.into() };
        let all = vec![frame(Kind::Stdout, "1\n2\n"), frame(Kind::Stderr, "3\n"), frame(Kind::Stdout, "4\npart")];
        let texts = |lines| -> Vec<String> {
            let kept = last(all.clone(), lines);
            kept.into_iter().map(|frame| String::from_utf8(frame.payload).unwrap()).collect()
        };
        assert_eq!(texts(9), ["1\n2\n", "3\n", "4\npart"]);
        assert_eq!(texts(3), ["2\n", "3\n", "4\npart"]);
        assert_eq!(texts(2), ["3\n", "4\npart"]);
        assert_eq!(texts(0), ["part"]);
    }
}
