//! The matrix of `threat-model.md`: what a process that was taken over might do, against each layer of the sandbox with all
//! the others off. A child of this process takes the layer upon itself, and then misbehaves.
#![allow(unsafe_code, reason = "misbehaviour is made of system calls")]

use std::ffi::CString;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Child, Command};
use std::ptr::null;

use sandbox::{Access, End, Layers, Mode, Needs, confine_by, confine_thread};

/// One layer alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    None,
    /// The filter of the thread that builds machines.
    SeccompOfMain,
    /// The filter of a thread of the guest's processors.
    SeccompOfVcpu,
    Landlock,
    Namespaces,
    Capabilities,
}

/// What a child's end says.
const DONE: i32 = 0;
const STOPPED: u8 = 77;

/// Runs `act` in a child that has `layer`, and one file that it may open. Returns how that ended: done, stopped, or with an
/// error number.
fn outcome(layer: Layer, needs: &Needs, act: impl Fn() -> io::Result<()>) -> i32 {
    let one = |kind| layer == kind;
    let layers = Layers {
        seccomp: one(Layer::SeccompOfMain) || one(Layer::SeccompOfVcpu),
        landlock: one(Layer::Landlock),
        namespaces: one(Layer::Namespaces),
        network: one(Layer::Namespaces),
        rights: one(Layer::Capabilities),
    };
    // SAFETY: the child goes on with this thread alone; the C library's locks are free in it.
    match unsafe { libc::fork() } {
        0 => {
            let confined = confine_by(layers, Mode::On, needs, End { code: STOPPED, last: || () });
            if one(Layer::SeccompOfVcpu) {
                confine_thread("vcpu");
            }
            let done = confined.map_err(io::Error::other).and_then(|()| act());
            let code = done.err().map_or(DONE, |error| error.raw_os_error().unwrap_or(255));
            // SAFETY: ends the child at once, without this process's clean-up.
            unsafe { libc::_exit(code) }
        }
        child => {
            let mut status = 0;
            // SAFETY: the child is ours and not yet waited for; the status lives across the call.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child, "{}", io::Error::last_os_error());
            assert!(libc::WIFEXITED(status), "{layer:?}: {status:#x}");
            libc::WEXITSTATUS(status)
        }
    }
}

/// Asserts that an act is done without a sandbox, and what each of these layers makes of it. The layers that are not named
/// do not keep it away, and the matrix does not say that they do.
fn assert_kept_away(act: impl Fn() -> io::Result<()> + Copy, layers: &[(Layer, &[i32])]) {
    assert_eq!(outcome(Layer::None, &Needs::default(), act), DONE, "without a sandbox it is possible");
    for (layer, expected) in layers {
        let outcome = outcome(*layer, &Needs::default(), act);
        assert!(expected.contains(&outcome), "{layer:?}: {outcome}");
    }
}

const BY_FILTER: &[i32] = &[STOPPED as i32];

fn check(result: i64) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is_root() -> bool {
    // SAFETY: it only reads a number of the process's own.
    unsafe { libc::geteuid() == 0 }
}

#[test]
fn passwords_are_kept_by_landlock_and_from_the_guest_s_threads_by_their_filters() {
    let passwords = if is_root() { "/etc/shadow" } else { "/etc/passwd" };
    let act = || fs::File::open(passwords).map(drop);
    assert_kept_away(act, &[(Layer::Landlock, &[libc::EACCES]), (Layer::SeccompOfVcpu, BY_FILTER)]);
}

#[test]
fn what_is_named_opens_under_landlock_in_the_way_that_was_named_and_no_other() {
    let folder = tempfile::tempdir().expect("there is room for files");
    let path = |name: &str| folder.path().join(name);
    for name in ["read", "written", "else"] {
        fs::write(path(name), name).expect("there is room for files");
    }
    fs::create_dir(path("made")).expect("there is room for files");
    let files = vec![
        (path("read"), Access::Read),
        (path("written"), Access::Write),
        (path("made"), Access::Make),
        (path("is-not-there"), Access::Write),
    ];
    let needs = Needs { files, ..Needs::default() };
    let landlock = |act: &dyn Fn() -> io::Result<()>| outcome(Layer::Landlock, &needs, act);
    let open =
        |name: &str, write: bool| landlock(&|| fs::File::options().read(true).write(write).open(path(name)).map(drop));
    assert_eq!([open("read", false), open("written", false), open("written", true)], [DONE; 3]);
    assert_eq!([open("read", true), open("else", false)], [libc::EACCES; 2]);
    assert_eq!(landlock(&|| fs::write(path("made/new"), "new").and_then(|()| fs::remove_file(path("made/new")))), DONE);
    assert_eq!(landlock(&|| fs::write(path("new"), "new")), libc::EACCES);
    assert_eq!(landlock(&|| fs::remove_file(path("written"))), libc::EACCES);
}

#[test]
fn a_connection_to_the_host_is_kept_away_by_filters_and_by_the_network_namespace() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it has an address");
    let act = move || std::net::TcpStream::connect(address).map(drop);
    let unreachable = [libc::ENETUNREACH, libc::ECONNREFUSED, libc::EADDRNOTAVAIL];
    let layers: [(Layer, &[i32]); 3] =
        [(Layer::SeccompOfMain, BY_FILTER), (Layer::SeccompOfVcpu, BY_FILTER), (Layer::Namespaces, &unreachable)];
    assert_kept_away(act, &layers);
}

/// A process of this user's.
struct Other(Child);

impl Other {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().expect("sleep is there"))
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn another_process_is_kept_from_ptrace_by_filters_and_by_landlock() {
    let other = Other::start();
    let pid = other.0.id();
    let nothing = null::<u8>();
    // SAFETY: no memory is passed. The other process goes on when this one ends.
    let act = move || check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, nothing, nothing) });
    let layers: [(Layer, &[i32]); 3] =
        [(Layer::SeccompOfMain, BY_FILTER), (Layer::SeccompOfVcpu, BY_FILTER), (Layer::Landlock, &[libc::EPERM])];
    assert_kept_away(act, &layers);
}

#[test]
fn a_signal_to_another_process_is_kept_away_by_filters() {
    let other = Other::start();
    let pid = i64::from(other.0.id());
    let layers: [(Layer, &[i32]); 2] = [(Layer::SeccompOfMain, BY_FILTER), (Layer::SeccompOfVcpu, BY_FILTER)];
    for call in [libc::SYS_tgkill, libc::SYS_kill] {
        // SAFETY: no memory is passed, and signal 0 is none.
        let act = move || check(unsafe { libc::syscall(call, pid, if call == libc::SYS_kill { 0 } else { pid }, 0) });
        assert_kept_away(act, &layers);
    }
    // A child has one thread, with the number of its process.
    let own = || {
        let pid = std::process::id();
        // SAFETY: no memory is passed, and signal 0 is none.
        check(unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, 0) })
    };
    assert_eq!(outcome(Layer::SeccompOfVcpu, &Needs::default(), own), DONE);
}

#[test]
fn a_mount_is_kept_away_by_filters_landlock_and_the_lack_of_capabilities() {
    if !is_root() {
        // Who is not root mounts nothing anyway.
        return;
    }
    let folder = tempfile::tempdir().expect("there is room for files");
    let place = CString::new(folder.path().as_os_str().as_bytes()).expect("a path");
    // SAFETY: the texts live across the call, and the data are none.
    let mount = || unsafe { libc::mount(c"none".as_ptr(), place.as_ptr(), c"tmpfs".as_ptr(), 0, null()) };
    // SAFETY: the text lives across the call.
    let unmount = || unsafe { libc::umount(place.as_ptr()) };
    let act = || check(mount().into()).and_then(|()| check(unmount().into()));
    let refused: &[i32] = &[libc::EPERM];
    assert_kept_away(
        act,
        &[
            (Layer::SeccompOfMain, BY_FILTER),
            (Layer::SeccompOfVcpu, BY_FILTER),
            (Layer::Landlock, refused),
            (Layer::Capabilities, refused),
        ],
    );
    // In a namespace of one's own it is nobody else's.
    assert_eq!(outcome(Layer::Namespaces, &Needs::default(), || check(mount().into())), DONE);
    let mounts = fs::read_to_string("/proc/self/mounts").expect("it is there");
    assert!(!mounts.contains(folder.path().to_str().expect("a path of text")));
}

#[test]
fn a_process_is_kept_away_by_filters() {
    // SAFETY: the child ends at once.
    let act = || match unsafe { libc::fork() } {
        // SAFETY: ends the child at once.
        0 => unsafe { libc::_exit(0) },
        child => check(child.into()),
    };
    assert_kept_away(act, &[(Layer::SeccompOfMain, BY_FILTER), (Layer::SeccompOfVcpu, BY_FILTER)]);
    let act = || Err(std::os::unix::process::CommandExt::exec(&mut Command::new("/bin/true")));
    assert_kept_away(
        act,
        &[(Layer::SeccompOfMain, BY_FILTER), (Layer::SeccompOfVcpu, BY_FILTER), (Layer::Landlock, &[libc::EACCES])],
    );
}

#[test]
fn new_code_is_kept_away_by_filters() {
    let executable = libc::PROT_READ | libc::PROT_EXEC;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a mapping of its own, at a place that the kernel chooses.
    let map = move |protection| unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, anonymous, -1, 0) };
    let mapped = move || if map(executable) == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) };
    let layers: [(Layer, &[i32]); 2] = [(Layer::SeccompOfMain, BY_FILTER), (Layer::SeccompOfVcpu, BY_FILTER)];
    assert_kept_away(mapped, &layers);
    // SAFETY: the mapping is this one's own, and nothing is in it.
    let changed = move || check(unsafe { libc::mprotect(map(libc::PROT_READ), 4096, executable) }.into());
    assert_kept_away(changed, &layers);
}

#[test]
fn what_is_root_s_is_kept_away_by_the_lack_of_capabilities() {
    if !is_root() {
        // Who is not root has it not anyway.
        return;
    }
    // SAFETY: the text lives for ever.
    let act = || check(unsafe { libc::chroot(c"/".as_ptr()) }.into());
    let layers: [(Layer, &[i32]); 3] =
        [(Layer::Capabilities, &[libc::EPERM]), (Layer::SeccompOfMain, BY_FILTER), (Layer::SeccompOfVcpu, BY_FILTER)];
    assert_kept_away(act, &layers);
}
