//! What the host asks for and what the guest answers: the messages, as JSON.
//!
//! | request | what follows from the host | what the guest answers |
//! |---|---|---|
//! | [`Request::Exec`] | `Stdin`, [`Control`] | `Started`, output, `Window`, `Exited` or `Killed`; or `NotStarted` |
//! | [`Request::Put`] | a copy | `Done` or `Failed` |
//! | [`Request::Get`] | | a copy and `Done`; or `Failed`, at any time |
//! | [`Request::Probe`] | | `Healthy` or `Unhealthy` |
//! | [`Request::Shutdown`] | | `Done`, before the machine goes down |
//!
//! What is not understood is answered with `Failed`, and the connection ends. Left out on purpose: arguments and
//! variables that are not UTF-8.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// How many bytes of standard input the host may have sent that no [`Answer::Window`] has given back.
pub const WINDOW: usize = 64 << 10;

/// The first message of the control connection: what the machine is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// The host name.
    pub hostname: String,
    /// In this order. If one of them is below `/newroot`, that becomes the root.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Network cards; the loop-back interface is always up.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// DNS servers. Without any, the root's `/etc/resolv.conf` stays as it is.
    #[serde(default)]
    pub nameservers: Vec<IpAddr>,
    /// Domains that names are searched in.
    #[serde(default)]
    pub search: Vec<String>,
    /// Nanoseconds since 1970.
    pub clock: u64,
}

/// What is mounted where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// A device, a tag, a folder or a file: what `fstype` needs.
    pub source: String,
    /// An absolute path, which is made where it is missing. `/newroot` is the new root, and below it no symbolic link
    /// leads out of it. Other places are the initramfs' own.
    pub target: String,
    /// The file system's name. It means nothing for a bind mount.
    #[serde(default)]
    pub fstype: String,
    /// Flags.
    #[serde(default)]
    pub flags: Vec<MountFlag>,
    /// The file system's own options. Of an overlay's, `upperdir` and `workdir` are made where they are missing.
    #[serde(default)]
    pub data: String,
}

/// A flag of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountFlag {
    /// Read-only.
    Ro,
    /// No set-user-ID programs.
    Nosuid,
    /// No devices.
    Nodev,
    /// No programs.
    Noexec,
    /// The source is a folder or file, which appears at the target too.
    Bind,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Its name, such as `eth0`.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Where everything else is reached: one of each family at most.
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// IPv4 or IPv6.
    pub ip: IpAddr,
    /// In bits.
    pub prefix: u8,
}

/// The first message of any other connection, and the second of the control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Runs a program, with its input and output.
    Exec(Exec),
    /// Makes a file or folder: a copy follows. If `path` is a folder, it goes into it under its own name.
    Put {
        /// An absolute path.
        path: String,
    },
    /// Sends a file or folder.
    Get {
        /// An absolute path. If it is a symbolic link, what it leads to is sent.
        path: String,
    },
    /// Whether a service answers.
    Probe(Probe),
    /// Ends all processes, and powers off.
    Shutdown {
        /// How long processes may take to end by themselves, after SIGTERM.
        grace_ms: u64,
    },
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// The program and its arguments. Without a slash it is looked up in the `PATH` of `env`, or else in the usual one.
    pub argv: Vec<String>,
    /// All of its environment, but for what it cannot do without: `PATH`, `HOME`, `USER` and `LOGNAME` are added where
    /// they are missing, and `TERM` in a terminal.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The working directory; `/` if there is none.
    #[serde(default)]
    pub cwd: Option<String>,
    /// `name|uid[:group|gid]`; whom the agent runs as if there is none.
    #[serde(default)]
    pub user: Option<String>,
}

/// Runs a program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program.
    pub program: Program,
    /// It is given a terminal of this size, and what it prints there comes as `Stdout`.
    #[serde(default)]
    pub terminal: Option<Size>,
    /// `Stdin` frames will come; otherwise its standard input is empty.
    #[serde(default)]
    pub stdin: bool,
}

/// A terminal's size, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Its height.
    pub rows: u16,
    /// Its width.
    pub columns: u16,
}

/// What the host says to a program that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Control {
    /// A signal for its process group, by its number.
    Signal(i32),
    /// Its terminal has another size.
    Resize(Size),
}

/// Whether a service in the guest answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// How to find out.
    pub check: Check,
    /// How long it may take.
    pub timeout_ms: u64,
}

/// How to find out whether a service answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Check {
    /// Something listens at the port of 127.0.0.1.
    Tcp {
        /// The port.
        port: u16,
    },
    /// GET has a status from 200 to 399.
    Http {
        /// The port of 127.0.0.1.
        port: u16,
        /// What is asked for; it begins with a slash.
        path: String,
    },
    /// The program exits with 0.
    Exec(Program),
}

/// What the guest answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Answer {
    /// The machine is as the [`Setup`] says.
    Ready,
    /// What was asked for did not work out, and the connection is over.
    Failed {
        /// A sentence that says why.
        message: String,
    },
    /// What was asked for is done.
    Done {
        /// How many things a copy left out that are neither files nor folders nor links.
        skipped: u64,
    },
    /// The program runs.
    Started,
    /// This many bytes of standard input were taken: as many more may be sent.
    Window {
        /// How many.
        bytes: u32,
    },
    /// The program has ended by itself, and all its output has been sent.
    Exited {
        /// Its exit code.
        code: u8,
    },
    /// A signal has ended the program, and all its output has been sent.
    Killed {
        /// The signal's number.
        signal: i32,
    },
    /// The program does not run.
    NotStarted {
        /// Which kind of trouble it is.
        kind: Trouble,
        /// A sentence that says why.
        message: String,
    },
    /// The service answers.
    Healthy,
    /// The service does not answer.
    Unhealthy {
        /// A sentence that says why.
        message: String,
    },
}

/// Why a program does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trouble {
    /// There is no such program: 127 in shells.
    NotFound,
    /// It is there and cannot be run: 126 in shells.
    NotExecutable,
    /// Anything else: an unknown user, no such working directory, no memory.
    Other,
}
