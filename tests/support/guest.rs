//! Guests with a real kernel, which answer questions.

use super::asset;
use super::process::{Ended, Running, Vmm};

/// What the guest's init is told to do: to say for how long it has been idle, to run each line that it is sent, and to
/// say how that ended. (`R''EADY` is how the echo of the kernel's command line is told from the word.)
const RUN: &str = concat!(
    r#"run="set -f;stty -echo;read -r cpu user nice system idle wait rest </proc/stat;echo R''EADY $idle $wait;"#,
    r#"while read -r l;do eval $l;echo =$?=;done""#
);

/// A guest that listens at its serial console.
pub(crate) struct Guest {
    pub(crate) vmm: Running,
    /// For how many ticks of 10 ms its processors had nothing to do until it listened.
    pub(crate) idle: u64,
    /// Bytes of its output that have been dealt with.
    seen: usize,
}

impl Guest {
    /// Boots a kernel (`NAME[,entry=…]` of the assets), quietly, with `words` on its command line too, and waits until
    /// it listens.
    pub(crate) fn boot(kernel: &str, arguments: &[&str], words: &str) -> Self {
        Self::listen(vmm(kernel, arguments, words).spawn())
    }

    /// Waits until a guest on pipes listens.
    pub(crate) fn listen(vmm: Running) -> Self {
        let mut guest = Self { vmm, idle: 0, seen: 0 };
        guest.wait_until_it_listens();
        guest
    }

    /// Waits until it listens, after its start or the next one.
    pub(crate) fn wait_until_it_listens(&mut self) {
        self.wait_for("READY ");
        let from = self.seen;
        self.wait_for("\r\n");
        let ticks = self.vmm.stdout().text(from);
        let ticks = ticks.lines().next().unwrap_or_default().split(' ');
        self.idle = ticks.map(|ticks| ticks.parse::<u64>().expect("a number of ticks")).sum();
    }

    /// Runs a line of shell in the guest, which must succeed, and returns what it printed.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        let from = self.seen;
        self.wait_for("=0=\r\n");
        let answer = self.vmm.stdout().text(from).replace('\r', "");
        let end = answer.find("=0=\n").expect("it has just been seen");
        answer[..end].trim().to_owned()
    }

    /// As [`Self::ask`], for a number.
    pub(crate) fn number(&mut self, command: &str) -> u64 {
        let answer = self.ask(command);
        answer.parse().unwrap_or_else(|_| panic!("{command} answered {answer:?}"))
    }

    /// Sends a line of shell to the guest.
    pub(crate) fn tell(&mut self, command: &str) {
        self.vmm.send(format!("{command}\n"));
    }

    /// Waits for `text` behind what has been seen.
    pub(crate) fn wait_for(&mut self, text: &str) {
        self.seen = self.vmm.stdout().wait_for(text, self.seen);
    }

    /// Sends the guest its last line, and waits for the end.
    pub(crate) fn end(mut self, command: &str) -> Ended {
        self.tell(command);
        self.vmm.wait()
    }
}

/// A machine with one of the assets' kernels, and the guest's init told to listen.
pub(crate) fn vmm(kernel: &str, arguments: &[&str], words: &str) -> Vmm {
    with_kernel(described(arguments, words), kernel)
}

/// A machine with one of the assets' kernels, and a shell at its console.
pub(crate) fn shell(kernel: &str, arguments: &[&str]) -> Vmm {
    let vmm = Vmm::new(arguments).arg("--initrd").arg(asset("initramfs-shell"));
    with_kernel(vmm.arg("--cmdline").arg("quiet"), kernel)
}

fn with_kernel(vmm: Vmm, kernel: &str) -> Vmm {
    let (name, options) = kernel.split_once(',').unwrap_or((kernel, ""));
    let mut value = asset(name).into_os_string();
    if !options.is_empty() {
        value.push(",");
        value.push(options);
    }
    vmm.arg("--kernel").arg(value)
}

/// A machine with a kernel that the arguments name, and the guest's init told to listen.
pub(crate) fn described(arguments: &[&str], words: &str) -> Vmm {
    let vmm = Vmm::new(arguments).arg("--initrd").arg(asset("initramfs-shell"));
    vmm.arg("--cmdline").arg(format!("quiet {words} {RUN}"))
}
