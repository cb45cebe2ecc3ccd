//! What a machine that was taken over can still do: threads of the real program are made to misbehave. The claims of
//! `threat-model.md` on filters and files are shown here; that each layer holds alone, in `crates/sandbox/tests/matrix.rs`.

mod support;

use std::ffi::CStr;
use std::fs;
use std::path::Path;

use support::inject::{Made, call};
use support::process::Running;
use support::tiny::{Code, puppet};

/// Acts that no machine ever needs: the name of the call, its number, its arguments.
const ACTS: [(&str, i64, &[Option<u64>]); 8] = [
    ("ptrace", libc::SYS_ptrace, &[Some(16), Some(1)]),
    ("mount", libc::SYS_mount, &[None, None, None]),
    ("fork", libc::SYS_fork, &[]),
    ("clone", libc::SYS_clone, &[Some(17)]),
    ("execve", libc::SYS_execve, &[None, Some(0), Some(0)]),
    // AF_INET, SOCK_STREAM.
    ("socket", libc::SYS_socket, &[Some(2), Some(1), Some(0)]),
    // PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS.
    ("mmap", libc::SYS_mmap, &[Some(0), Some(4096), Some(5), Some(0x22), Some(u64::MAX), Some(0)]),
    // TIOCSTI, which types for the user.
    ("ioctl", libc::SYS_ioctl, &[Some(0), Some(0x5412), None]),
];

const PASSWORDS: &CStr = c"/etc/shadow";

/// A machine with a thread of each kind, whose guest echoes what it is sent.
struct Machine {
    vmm: Running,
    /// Bytes of its output that have been dealt with.
    seen: usize,
    _folder: tempfile::TempDir,
}

impl Machine {
    fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("there is room for files");
        let disk = folder.path().join("disk");
        fs::write(&disk, [0; 4096]).expect("there is room for files");
        let kernel = puppet(&[(b'q', Code::default().power_off()), (b'r', Code::default().reset())]);
        let vmm = kernel.vmm(arguments).arg("--disk").arg(&disk).arg("--api-socket").arg(folder.path().join("socket"));
        let vmm = vmm.spawn();
        let seen = vmm.stdout().wait_for(">", 0);
        Self { vmm, seen, _folder: folder }
    }

    fn power_off(mut self) {
        self.vmm.send("q");
        self.vmm.wait().assert(0, "the guest powered off");
    }

    /// A line of /proc/PID/task/TID/status of each thread.
    fn status(&self, key: &str) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.vmm.pid().as_raw_nonzero())).expect("it runs");
        let status = |task: std::io::Result<fs::DirEntry>| {
            let status = fs::read_to_string(task.expect("it runs").path().join("status")).expect("it runs");
            let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {key} in {status}")).trim().to_owned()
        };
        tasks.map(status).collect()
    }
}

const THREADS: [&str; 4] = ["vmm", "vcpu-0", "io-0", "api"];

#[test]
fn an_act_that_no_machine_needs_ends_it_with_one_line_whichever_thread_is_made_to_do_it() {
    for (index, (name, number, arguments)) in ACTS.into_iter().enumerate() {
        let thread = THREADS[index % THREADS.len()];
        let machine = Machine::start(&[]);
        assert_eq!(
            call(&machine.vmm, thread, number, arguments, c"/"),
            Made::Signal(libc::SIGSYS),
            "{name} by {thread}"
        );
        let ended = machine.vmm.wait();
        let line = format!("vmm: the sandbox stopped thread {thread} at system call {name} ({number}): ");
        assert!(ended.stderr.starts_with(&line) && ended.stderr.lines().count() == 1, "{ended:?}");
        assert_eq!(ended.code, Some(7));
    }
}

#[test]
fn only_the_main_thread_opens_files_and_only_those_of_the_configuration() {
    let open = [None, Some(0), Some(0)];
    for thread in &THREADS[1..] {
        let machine = Machine::start(&[]);
        let made = call(&machine.vmm, thread, libc::SYS_open, &open, PASSWORDS);
        assert_eq!(made, Made::Signal(libc::SIGSYS), "{thread}");
        assert_eq!(machine.vmm.wait().code, Some(7));
    }
    let machine = Machine::start(&[]);
    let open = |path: &CStr, flags| call(&machine.vmm, "vmm", libc::SYS_open, &[None, Some(flags), Some(0o600)], path);
    let refused = Made::Result(-i64::from(libc::EACCES));
    let create = u64::from((libc::O_WRONLY | libc::O_CREAT).cast_unsigned());
    assert_eq!(open(PASSWORDS, 0), refused);
    assert_eq!(open(c"/proc/1/environ", 0), refused);
    assert_eq!(open(c"/tmp/of-a-machine-that-was-taken-over", create), refused);
    assert!(!Path::new("/tmp/of-a-machine-that-was-taken-over").exists());
    machine.power_off();
}

#[test]
fn a_report_names_each_call_once_and_the_machine_goes_on() {
    let mut machine = Machine::start(&["--sandbox", "report"]);
    for _ in 0..2 {
        let made = call(&machine.vmm, "io-0", libc::SYS_munlockall, &[], c"");
        assert_eq!(made, Made::Signal(libc::SIGSYS));
    }
    machine.vmm.send("q");
    let ended = machine.vmm.wait();
    assert_eq!(ended.code, Some(0));
    let line =
        format!("vmm: the sandbox would stop thread io-0 at system call munlockall ({})\n", libc::SYS_munlockall);
    assert_eq!(ended.stderr, format!("{line}vmm: the guest powered off\n"));
}

#[test]
fn without_a_sandbox_nothing_is_kept_from_anybody() {
    let machine = Machine::start(&["--sandbox", "off"]);
    assert_eq!(call(&machine.vmm, "io-0", libc::SYS_munlockall, &[], c""), Made::Result(0));
    let Made::Result(opened) = call(&machine.vmm, "vcpu-0", libc::SYS_open, &[None, Some(0), Some(0)], c"/etc/passwd")
    else {
        panic!("a signal came")
    };
    assert!(opened > 2);
    assert!(machine.status("Seccomp").iter().all(|mode| mode == "0"));
    machine.power_off();
}

#[test]
fn no_thread_has_a_capability_or_can_get_one_and_the_host_s_network_is_out_of_sight() {
    let mut machine = Machine::start(&["--sandbox", "strict"]);
    let of_all = |machine: &Machine| {
        for (key, value) in
            [("Seccomp", "2"), ("NoNewPrivs", "1"), ("CapEff", NONE), ("CapPrm", NONE), ("CapAmb", NONE)]
        {
            let values = machine.status(key);
            assert!(values.len() >= THREADS.len() && values.iter().all(|found| found == value), "{key}: {values:?}");
        }
    };
    of_all(&machine);
    // By default all of it but the network namespace.
    let usual = Machine::start(&[]);
    of_all(&usual);
    for (machine, namespaces) in [(&machine, &["net", "ipc", "mnt", "uts"][..]), (&usual, &["ipc", "mnt", "uts"])] {
        let link = |pid: &str, name| fs::read_link(format!("/proc/{pid}/ns/{name}")).expect("it runs");
        let pid = machine.vmm.pid().as_raw_nonzero().to_string();
        assert!(namespaces.iter().all(|name| link(&pid, name) != link("self", name)), "{namespaces:?}");
    }
    usual.power_off();
    assert!(
        machine.vmm.proc("limits").lines().any(|line| line.starts_with("Max core file size") && line.contains(" 0 "))
    );
    // Nor after a reboot, which opens all files again.
    machine.vmm.send("r");
    machine.vmm.stdout().wait_for(">", machine.seen);
    of_all(&machine);
    machine.power_off();
}

const NONE: &str = "0000000000000000";
