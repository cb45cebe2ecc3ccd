//! Where log lines go: standard error, or a file.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;

use log::{LevelFilter, Log, Metadata, Record};

use crate::exit::Usage;

/// Writes one line a record. A line that cannot be written is lost: there is nowhere to say so.
struct Logger {
    file: Option<Mutex<File>>,
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = record.level().as_str().to_ascii_lowercase();
        let line = format!("vmm: {level}: {}\n", record.args());
        let _ = match &self.file {
            Some(file) => file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

/// Starts logging lines of `level` and more important ones, to `file` (appended to) or standard error.
pub(crate) fn start(level: LevelFilter, file: Option<&Path>) -> Result<(), Usage> {
    let file = file.map(|path| {
        let file = File::options().append(true).create(true).open(path);
        file.map(Mutex::new).map_err(|error| {
            Usage(format!("the log file {} does not open ({error}): give --log-file another path", path.display()))
        })
    });
    log::set_max_level(level);
    log::set_boxed_logger(Box::new(Logger { file: file.transpose()? })).expect("logging starts once");
    Ok(())
}
