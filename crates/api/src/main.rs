//! The `vmm-ctl` command, which `vmm ctl` starts: controls a machine that runs, through its control socket.
//!
//! A file is opened here, by who asks, and goes to the machine as a descriptor: the machine need not be able to open it.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use api::{Client, ClientError};
use clap::{Args, Parser, Subcommand};
use kv::Size;
use serde_json::{Value, json};

/// Controls a machine that runs, through its --api-socket.
#[derive(Debug, Parser)]
#[command(name = "vmm ctl", version, disable_help_subcommand = true)]
struct CtlArgs {
    /// The socket that --api-socket made
    socket: PathBuf,
    #[command(subcommand)]
    verb: Verb,
    /// Print answers as JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Says whether the machine runs
    Status,
    /// Says what the machine is now
    Config,
    /// Stops the processors where they are
    Pause,
    /// Lets the processors run on
    Resume,
    /// Presses the power button
    #[command(alias = "stop")]
    PowerButton,
    /// Puts another image into a drive, or has the guest see the size that its image has now
    Drive {
        /// The drive's name, as `config` tells it
        id: String,
        #[command(flatten)]
        change: DriveChange,
    },
    /// Says what the balloon is, or sets its size; `stats` says what the guest has of memory
    Balloon {
        /// A size, such as 256M, or stats
        size: Option<String>,
    },
    /// Sends a GET request
    Get {
        /// Such as /vm/config
        path: String,
    },
    /// Sends a PUT request
    Put {
        /// Such as /actions
        path: String,
        /// The body, as JSON
        body: String,
    },
    /// Sends a PATCH request
    Patch {
        /// Such as /vm
        path: String,
        /// The body, as JSON
        body: String,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct DriveChange {
    /// The image to put in
    #[arg(long, value_name = "FILE")]
    path: Option<PathBuf>,
    /// Take up the size that the image has now
    #[arg(long)]
    resize: bool,
}

/// A mistake of the user's.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

fn main() -> ExitCode {
    let args = match CtlArgs::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("vmm: {}", kv::help::one_line(&error));
            return ExitCode::from(2);
        }
    };
    run(&args).unwrap_or_else(|error| {
        // A user's mistake is told whole by its own sentence; of a failure every cause is told.
        if error.is::<Usage>() {
            eprintln!("vmm: {error}");
            return ExitCode::from(2);
        }
        eprintln!("vmm: {error:#}");
        ExitCode::FAILURE
    })
}

/// Does what is asked.
fn run(args: &CtlArgs) -> anyhow::Result<ExitCode> {
    let mut machine = Machine(Client::connect(&args.socket).map_err(explain)?);
    let answer = match &args.verb {
        Verb::Status => machine.get("/")?,
        Verb::Config => machine.get("/vm/config")?,
        Verb::Pause => machine.send("PATCH", "/vm", &json!({ "state": "Paused" }))?,
        Verb::Resume => machine.send("PATCH", "/vm", &json!({ "state": "Resumed" }))?,
        Verb::PowerButton => machine.send("PUT", "/actions", &json!({ "action_type": "SendCtrlAltDel" }))?,
        Verb::Drive { id, change } => machine.change_drive(id, change.path.as_deref())?,
        Verb::Balloon { size: None } => machine.get("/balloon")?,
        Verb::Balloon { size: Some(word) } if word == "stats" => machine.get("/balloon/statistics")?,
        Verb::Balloon { size: Some(size) } => {
            machine.send("PATCH", "/balloon", &json!({ "amount_mib": mib(size)? }))?
        }
        Verb::Get { path } => machine.ask("GET", path, None, None)?,
        Verb::Put { path, body } => machine.ask("PUT", path, Some(body), None)?,
        Verb::Patch { path, body } => machine.ask("PATCH", path, Some(body), None)?,
    };
    if let Some(body) = answer {
        let text = if args.json { format!("{body:#}\n") } else { plain(&body) };
        std::io::stdout().write_all(text.as_bytes()).context("Cannot print the answer")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The machine at the other end. What it refuses is the user's mistake.
struct Machine(Client);

impl Machine {
    fn get(&mut self, path: &str) -> anyhow::Result<Option<Value>> {
        self.ask("GET", path, None, None)
    }

    fn send(&mut self, method: &str, path: &str, body: &Value) -> anyhow::Result<Option<Value>> {
        self.ask(method, path, Some(&body.to_string()), None)
    }

    fn ask(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&str>,
        file: Option<&File>,
    ) -> anyhow::Result<Option<Value>> {
        if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Usage(format!("{path} is no path of a request: it begins with /, see GET /vm/config")).into());
        }
        let answer = self.0.ask(method, path, body, file.map(|file| file.as_fd())).map_err(explain)?;
        match (answer.fault(), answer.status) {
            (Some(fault), 500..) => anyhow::bail!("The machine cannot do that: {fault}"),
            (Some(fault), _) => Err(Usage(fault.to_owned()).into()),
            (None, _) => Ok(answer.body),
        }
    }

    /// Another image, or the one that is in the drive.
    fn change_drive(&mut self, id: &str, image: Option<&Path>) -> anyhow::Result<Option<Value>> {
        let config = self.get("/vm/config")?.unwrap_or_default();
        let drives = config.get("drives").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let drive = drives.iter().find(|drive| drive.get("drive_id").and_then(Value::as_str) == Some(id));
        let of_drive = |key| drive.and_then(|drive| drive.get(key));
        let (path, file) = match image {
            Some(image) => {
                let readonly = of_drive("is_read_only").and_then(Value::as_bool).unwrap_or(false);
                let path = std::path::absolute(image).context("Cannot tell the current folder")?;
                (path, Some(open(image, !readonly)?))
            }
            // A drive that does not exist is refused with the names of those that do.
            None => (PathBuf::from(of_drive("path_on_host").and_then(Value::as_str).unwrap_or("?")), None),
        };
        let path = path.to_str().ok_or_else(|| Usage(format!("{} is not UTF-8: rename it", path.display())))?;
        let body = json!({ "drive_id": id, "path_on_host": path }).to_string();
        self.ask("PATCH", &Client::path_of("/drives", id), Some(&body), file.as_ref())
    }
}

fn open(image: &Path, write: bool) -> Result<File, Usage> {
    // A pipe is refused by the machine, and opening one shall not wait for its other end.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let opened = OpenOptions::new().read(true).write(write).custom_flags(flags).open(image);
    opened.map_err(|error| {
        let what = if write { "to read and write" } else { "to read" };
        Usage(format!(
            "Cannot open {} {what}, as the drive needs it ({error}): check its path and mode",
            image.display()
        ))
    })
}

/// MiB in a size.
fn mib(text: &str) -> Result<u64, Usage> {
    let size: Size = text.parse().map_err(|error| Usage(format!("{error}; or say stats")))?;
    match size.bytes() {
        bytes if bytes.is_multiple_of(1 << 20) => Ok(bytes >> 20),
        _ => Err(Usage(format!("A balloon of {size} is not possible here: say a multiple of 1M"))),
    }
}

/// Whose fault it is that there is no answer.
fn explain(error: ClientError) -> anyhow::Error {
    match error {
        ClientError::Connect { .. } | ClientError::Stranger(_) => Usage(error.to_string()).into(),
        error => error.into(),
    }
}

/// An answer for people: one line a value, `a.b value`.
fn plain(value: &Value) -> String {
    let mut lines = String::new();
    print("", value, &mut lines);
    lines
}

fn print(name: &str, value: &Value, lines: &mut String) {
    let inner = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    match value {
        Value::Null => {}
        Value::Object(fields) => fields.iter().for_each(|(key, value)| print(&inner(key), value, lines)),
        Value::Array(values) => {
            values.iter().enumerate().for_each(|(at, value)| print(&inner(&at.to_string()), value, lines));
        }
        Value::String(text) => lines.push_str(&format!("{name} {text}\n")),
        value => lines.push_str(&format!("{name} {value}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_line_a_value_and_nothing_for_what_is_not_there() {
        let answer = json!({ "a": { "b": 1, "none": null }, "list": ["x", true] });
        assert_eq!(plain(&answer), "a.b 1\nlist.0 x\nlist.1 true\n");
    }

    #[test]
    fn a_balloons_size_is_whole_mebibytes() {
        assert_eq!(mib("256M").unwrap(), 256);
        assert_eq!(mib("0").unwrap(), 0);
        assert!(mib("3K").unwrap_err().to_string().contains("multiple of 1M"));
        assert!(mib("state").unwrap_err().to_string().contains("stats"));
    }
}
