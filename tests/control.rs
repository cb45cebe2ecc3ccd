//! Machines that run, controlled through their sockets: by `vmm ctl` and by other clients. The guests are a few
//! instructions long, so any `/dev/kvm` will do; what a real guest makes of it is in `devices`.

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use api::{Answer, Client};
use rustix::process::Signal;
use support::machine::MIB;
use support::process::{Ended, Running, Vmm};
use support::pty::Pty;
use support::tiny::{Code, puppet};
use support::until;
use tempfile::TempDir;

/// A machine whose guest echoes what it is sent, reboots for an `r` and powers off for a `q`; its socket, and files.
struct Machine {
    vmm: Running,
    folder: Rc<TempDir>,
}

impl Machine {
    /// Images in the folder, `NAME=MIB`, and arguments, in which `@` is the folder.
    fn start(images: &[(&str, u64)], arguments: &[&str]) -> Self {
        let folder = Rc::new(tempfile::tempdir().expect("there is room for files"));
        for (name, mib) in images {
            let file = File::create(folder.path().join(name)).expect("there is room for files");
            file.set_len(mib * MIB).expect("there is room for files");
        }
        let place = format!("{}/", folder.path().display());
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.replace('@', &place)).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let kernel = puppet(&[(b'r', Code::default().reset()), (b'q', Code::default().power_off())]);
        let vmm = kernel.vmm(&arguments).with(&folder).arg("--api-socket").arg(folder.path().join("socket")).spawn();
        vmm.stdout().wait_for(">", 0);
        Self { vmm, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    fn ctl(&self, words: &[&str]) -> Ended {
        ctl(&self.socket(), words)
    }

    /// What `vmm ctl` prints where all is well.
    #[track_caller]
    fn asked(&self, words: &[&str]) -> String {
        let ended = self.ctl(words);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{words:?}: {ended:#?}");
        ended.stdout
    }

    #[track_caller]
    fn assert_refused(&self, words: &[&str], parts: &[&str]) {
        self.ctl(words).assert_refused(parts);
    }

    fn change_drive(&self, id: &str, path: &str, file: Option<&File>) -> Answer {
        let mut client = Client::connect(&self.socket()).expect("it listens");
        let body = format!(r#"{{"drive_id":{id:?},"path_on_host":{path:?}}}"#);
        let file = file.map(File::as_fd);
        client.ask("PATCH", &Client::path_of("/drives", id), Some(&body), file).expect("it answers")
    }

    /// The image that the drive has, as the machine tells it.
    fn image(&self, drive: usize) -> String {
        let config = self.asked(&["config"]);
        let key = format!("drives.{drive}.path_on_host ");
        let line = config.lines().find_map(|line| line.strip_prefix(&key));
        line.unwrap_or_else(|| panic!("no {key} in {config}")).to_owned()
    }

    fn runs(&self) -> bool {
        self.vmm.thread_names().iter().any(|name| name.starts_with("vcpu-"))
    }

    /// Sends the guest a letter and waits for its echo.
    fn assert_lives(&mut self, letter: &str) {
        let seen = self.vmm.stdout().text(0).len();
        self.vmm.send(letter);
        self.vmm.stdout().wait_for(letter, seen);
    }

    fn power_off(mut self) {
        self.vmm.send("q");
        self.vmm.wait().assert(0, "the guest powered off");
    }
}

fn ctl(socket: &Path, words: &[&str]) -> Ended {
    Vmm::new([Path::new("ctl"), socket]).args(words).run()
}

/// Closes a socket. A child that another test is just starting may still have it for a moment.
fn die(listener: UnixListener, path: &Path) {
    drop(listener);
    until("nobody listens", || UnixStream::connect(path).is_err());
}

/// A machine that would end at once with this image as its only disk.
fn try_disk(image: &Path) -> Ended {
    Code::default().power_off().halt().kernel(&[]).run(&["--disk", image.to_str().expect("ASCII")], "")
}

#[test]
fn a_machine_says_what_it_is() {
    let machine = Machine::start(&[("root.img", 1)], &["--name", "web", "--disk", "@root.img", "--cpus", "1"]);
    assert_eq!(fs::metadata(machine.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    let status = machine.asked(&["status"]);
    for line in ["app_name vmm\n", "id web\n", "state Running\n"] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    let config = machine.asked(&["config"]);
    for line in ["drives.0.drive_id root\n", "machine-config.mem_size_mib 32\n", "machine-config.vcpu_count 1\n"] {
        assert!(config.contains(line), "{line} is not in {config}");
    }
    let json = machine.asked(&["--json", "get", "/machine-config"]);
    assert!(json.contains("\"mem_size_mib\": 32"), "{json}");
    let socket = machine.socket();
    let mut vmm = machine.vmm;
    vmm.send("q");
    let ended = vmm.wait();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), "web: the guest powered off\n"));
    assert!(!socket.exists(), "the socket goes with its machine");
}

#[test]
fn a_paused_machine_stands_still_until_it_is_resumed() {
    let mut machine = Machine::start(&[], &[]);
    assert!(machine.runs());
    // It is the state that is asked for, so twice is as good as once.
    for _ in 0..2 {
        assert_eq!(machine.asked(&["pause"]), "");
        assert!(machine.asked(&["status"]).contains("state Paused\n"));
        assert!(!machine.runs());
    }
    machine.assert_refused(&["power-button"], &["paused", "resume"]);
    machine.vmm.send("x");
    for _ in 0..2 {
        assert_eq!(machine.asked(&["resume"]), "");
        assert!(machine.asked(&["status"]).contains("state Running\n"));
        assert!(machine.runs());
    }
    machine.vmm.stdout().wait_for(">x", 0);
    machine.assert_lives("y");
    machine.power_off();
}

#[test]
fn a_paused_machine_ends_by_signals_and_by_ctrl_a_x() {
    let machine = Machine::start(&[], &["--log-level", "info"]);
    machine.asked(&["pause"]);
    machine.vmm.signal(Signal::TERM);
    machine.vmm.stderr.wait_for("pressing the guest's power button", 0);
    // It does not hear its button; the second signal is the end.
    machine.vmm.signal(Signal::TERM);
    assert_eq!(machine.vmm.wait().code, Some(143));

    let (mut pty, folder) = (Pty::open(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("socket");
    let vmm = puppet(&[]).vmm(&["--api-socket", socket.to_str().unwrap()]).spawn_at(&pty);
    pty.screen.wait_for(">", 0);
    assert_eq!(ctl(&socket, &["pause"]).code, Some(0));
    pty.send("\x01x");
    vmm.wait().assert(0, "ended at the console");
    assert!(!socket.exists());
}

#[test]
fn what_the_schema_has_and_this_machine_refuses_is_said() {
    let machine = Machine::start(&[], &[]);
    for (words, part) in [
        (&["put", "/actions", r#"{"action_type":"InstanceStart"}"#][..], "started already"),
        (&["put", "/actions", r#"{"action_type":"FlushMetrics"}"#], "no metrics"),
        (&["put", "/boot-source", r#"{"kernel_image_path":"x"}"#], "Invalid request method and/or path"),
        (&["patch", "/vm", r#"{"state":"Paused","x":1}"#], "unknown field `x`"),
        (&["patch", "/vm", "nonsense"], "The body is wrong"),
        (&["patch", "/vm", ""], "give it one"),
        (&["get", "/nothing"], "GET /nothing"),
        (&["get", "nothing"], "begins with /"),
        (&["balloon"], "--balloon"),
        (&["balloon", "64M"], "--balloon"),
        (&["balloon", "stats"], "--balloon"),
        (&["drive", "root", "--resize"], "no drive root"),
        (&["drive", "root", "--path", "/etc/passwd"], "no drive root"),
    ] {
        machine.assert_refused(words, &[part]);
    }
    machine.power_off();
}

#[test]
fn a_medium_is_swapped_and_stays_through_a_reboot() {
    let images = [("old.img", 1), ("new.img", 2), ("newer.img", 3)];
    let mut machine = Machine::start(&images, &["--disk", "@old.img", "--api-folder", "@"]);
    let [old, new, newer] = images.map(|(name, _)| machine.path(name));
    machine.asked(&["drive", "old", "--path", new.to_str().unwrap()]);
    assert_eq!(machine.image(0), new.to_str().unwrap());
    try_disk(&old).assert(0, "the guest powered off");
    try_disk(&new).assert_refused(&["locked"]);
    // The drive keeps its name, and in the next machine what is in it.
    machine.vmm.send("r");
    machine.vmm.stdout().wait_for(">>", 0);
    assert_eq!(machine.image(0), new.to_str().unwrap());
    try_disk(&new).assert_refused(&["locked"]);
    // Other clients name a path, and the machine opens it, if it may.
    assert_eq!(machine.change_drive("old", newer.to_str().unwrap(), None).status, 204);
    try_disk(&new).assert(0, "the guest powered off");
    try_disk(&newer).assert_refused(&["locked"]);
    machine.power_off();
}

#[test]
fn a_file_that_is_named_lies_in_a_folder_that_was_allowed() {
    let images = [("old.img", 1), ("other.img", 1)];
    let folder = tempfile::tempdir().unwrap();
    let allowed = folder.path().join("allowed");
    fs::create_dir_all(allowed.join("in")).unwrap();
    let arguments = ["--disk", "@old.img", "--disk", "@other.img,readonly", "--api-folder"];
    let machine = Machine::start(&images, &[&arguments[..], &[allowed.to_str().unwrap()]].concat());
    let other = machine.path("other.img");
    let change = |path: &Path| machine.change_drive("old", path.to_str().unwrap(), None);
    let refused = |path: &Path, part: &str| {
        let answer = change(path);
        assert_eq!(answer.status, 400);
        assert!(answer.fault().unwrap().contains(part), "{answer:?}");
    };
    refused(&other, "--api-folder");
    refused(&allowed.with_file_name("allowed2/x"), "--api-folder");
    refused(&allowed.join("none"), "does not exist");
    refused(&allowed, "is a directory");
    refused(&allowed.join("in"), "is a directory");
    refused(&allowed.join("../secret"), "leads out");
    symlink(&other, allowed.join("link")).unwrap();
    refused(&allowed.join("link"), "leads out");
    symlink("in/image", allowed.join("inner")).unwrap();
    File::create(allowed.join("in/image")).unwrap().set_len(MIB).unwrap();
    assert_eq!(change(&allowed.join("inner")).status, 204);
    // What a file that was sent is called does not become a path that may be opened.
    let third = machine.path("third.img");
    let sent = File::options().read(true).write(true).create_new(true).open(machine.path("sent.img")).unwrap();
    sent.set_len(MIB).unwrap();
    File::create(&third).unwrap().set_len(MIB).unwrap();
    assert_eq!(machine.change_drive("old", third.to_str().unwrap(), Some(&sent)).status, 204);
    assert_eq!(change(&third).status, 204);
    try_disk(&third).assert(0, "the guest powered off");
    try_disk(&machine.path("sent.img")).assert_refused(&["locked"]);
    // The one that is in the drive need not be opened again.
    assert_eq!(machine.change_drive("other", other.to_str().unwrap(), None).status, 204);
    let lone = Code::default().power_off().halt().kernel(&[]);
    lone.vmm(&["--api-folder", "/tmp"]).run().assert_refused(&["--api-socket"]);
    let nowhere = ["--api-socket", "/nonexistent/socket", "--api-folder", "/nonexistent"];
    lone.vmm(&nowhere).run().assert_refused(&["--api-folder", "/nonexistent"]);
    machine.power_off();
}

#[test]
fn a_file_that_has_been_sent_needs_no_name_that_the_machine_can_open() {
    let mut machine = Machine::start(&[("old.img", 1), ("new.img", 2)], &["--disk", "@old.img"]);
    let file = File::options().read(true).append(true).open(machine.path("new.img")).unwrap();
    fs::remove_file(machine.path("new.img")).unwrap();
    assert_eq!(machine.change_drive("old", "gone", Some(&file)).status, 204);
    assert_eq!(machine.image(0), "gone");
    machine.vmm.send("r");
    machine.vmm.stdout().wait_for(">>", 0);
    assert_eq!(machine.image(0), "gone");
    // The same file again is its size.
    file.set_len(4 * MIB).unwrap();
    assert_eq!(machine.change_drive("old", "gone", Some(&file)).status, 204);
    machine.assert_lives("x");
    machine.power_off();
}

#[test]
fn a_file_that_is_not_one_for_the_drive_is_refused_and_the_old_one_stays() {
    let images = [("old.img", 1), ("other.img", 1), ("fixed.img", 1)];
    let machine = Machine::start(&images, &["--disk", "@old.img", "--disk", "@fixed.img,readonly"]);
    let open =
        |name: &str| File::options().read(true).write(true).create(true).truncate(false).open(machine.path(name));
    let fault = |file: &File| {
        let answer = machine.change_drive("old", "label", Some(file));
        assert_eq!(answer.status, 400);
        answer.fault().unwrap().to_owned()
    };
    let read_only = File::open(machine.path("other.img")).unwrap();
    assert!(fault(&read_only).contains("not open for writing"));
    let write_only = File::options().write(true).open(machine.path("other.img")).unwrap();
    assert!(fault(&write_only).contains("not open for reading"));
    assert!(fault(&File::open("/").unwrap()).contains("not open for writing"));
    assert!(fault(&open("empty").unwrap()).contains("empty"));
    let mut qcow2 = open("qcow2").unwrap();
    qcow2.write_all(b"QFI\xfb").and_then(|()| qcow2.set_len(MIB)).unwrap();
    assert!(fault(&qcow2).contains("qcow2"));
    open("odd").unwrap().set_len(777).unwrap();
    assert!(fault(&open("odd").unwrap()).contains("512-byte blocks"));
    // A second VM holds it.
    let holder = Machine::start(&[("held.img", 1)], &["--disk", "@held.img"]);
    let held = File::options().read(true).write(true).open(holder.path("held.img")).unwrap();
    assert!(fault(&held).contains("locked"));
    holder.power_off();

    assert_eq!(machine.change_drive("fixed", "label", Some(&read_only)).status, 204);
    assert_eq!(machine.image(0), machine.path("old.img").to_str().unwrap());
    machine.power_off();
}

#[test]
fn what_cannot_be_put_into_a_drive_is_said_by_ctl() {
    let machine = Machine::start(
        &[("old.img", 1), ("base.img", 1)],
        &["--disk", "@old.img", "--disk", "@base.img,overlay=@over"],
    );
    let missing = machine.path("missing");
    machine.assert_refused(&["drive", "old", "--path", missing.to_str().unwrap()], &["missing", "check its path"]);
    machine.assert_refused(&["drive", "old", "--path", "/"], &["Cannot open /"]);
    machine.assert_refused(&["drive", "odl", "--resize"], &["no drive odl", "old, base"]);
    machine.assert_refused(&["drive", "base", "--resize"], &["overlay", "stop the VM"]);
    machine.assert_refused(&["drive", "old"], &["--path", "--resize"]);
    machine.assert_refused(&["drive", "old", "--resize", "--path", "x"], &["--path", "--resize"]);
    File::options().write(true).open(machine.path("old.img")).unwrap().set_len(777).unwrap();
    machine.assert_refused(&["drive", "old", "--resize"], &["777 bytes", "truncate"]);
    machine.power_off();
}

#[test]
fn a_balloon_is_resized_and_keeps_its_size_through_a_reboot() {
    let mut machine = Machine::start(&[], &["--balloon", "1M,stats-interval=1", "--transport", "mmio"]);
    assert!(machine.asked(&["balloon"]).contains("amount_mib 1\n"));
    machine.asked(&["balloon", "8M"]);
    assert!(machine.asked(&["balloon"]).contains("amount_mib 8\n"));
    let statistics = machine.asked(&["balloon", "stats"]);
    assert!(statistics.contains("target_mib 8\n") && statistics.contains("actual_mib 0\n"), "{statistics}");
    machine.asked(&["patch", "/balloon/statistics", r#"{"stats_polling_interval_s":5}"#]);
    machine.assert_refused(&["patch", "/balloon/statistics", r#"{"stats_polling_interval_s":0}"#], &["1 or more"]);
    machine.assert_refused(&["balloon", "17T"], &["less than 16T"]);
    machine.assert_refused(&["balloon", "1K"], &["multiple of 1M"]);
    machine.assert_refused(&["balloon", "state"], &["state", "stats"]);
    machine.vmm.send("r");
    machine.vmm.stdout().wait_for(">>", 0);
    let balloon = machine.asked(&["balloon"]);
    assert!(balloon.contains("amount_mib 8\n") && balloon.contains("stats_polling_interval_s 5\n"), "{balloon}");
    machine.power_off();
    let machine = Machine::start(&[], &["--balloon"]);
    machine.assert_refused(&["balloon", "stats"], &["stats-interval"]);
    machine.assert_refused(&["patch", "/balloon/statistics", r#"{"stats_polling_interval_s":5}"#], &["stats-interval"]);
    machine.power_off();
}

#[test]
fn a_client_that_stalls_keeps_neither_others_nor_the_guest_waiting() {
    let mut machine = Machine::start(&[], &[]);
    let mut stalled = UnixStream::connect(machine.socket()).unwrap();
    stalled.write_all(b"PATCH /vm HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").unwrap();
    assert!(machine.asked(&["status"]).contains("Running"));
    machine.assert_lives("x");
    let mut garbage = UnixStream::connect(machine.socket()).unwrap();
    garbage.write_all(b"\x16\x03\x01 what\r\n\r\n").unwrap();
    let mut answer = [0; 12];
    garbage.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 400");
    machine.power_off();
}

#[test]
fn a_socket_that_cannot_be_made_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let machine =
        |socket: &Path| Code::default().power_off().halt().kernel(&[]).vmm(&[]).arg("--api-socket").arg(socket);
    fs::write(path("file"), "precious").unwrap();
    machine(&path("file")).run().assert_refused(&["file", "is no socket"]);
    machine(&path("none/socket")).run().assert_refused(&["none/socket", "--api-socket"]);
    machine(&path(&"x".repeat(120))).run().assert_refused(&["short path"]);
    let live = UnixListener::bind(path("live")).unwrap();
    machine(&path("live")).run().assert_refused(&["live", "in use"]);
    die(live, &path("live"));
    machine(&path("live")).run().assert(0, "the guest powered off");
    assert!(!path("live").exists());
    let kernel = Vmm::new(["--kernel", "/nonexistent", "--api-socket"]).arg(path("early"));
    assert_eq!(kernel.run().code, Some(2));
    assert!(!path("early").exists(), "a machine that is refused leaves no socket");
}

#[test]
fn ctl_says_what_is_wrong_with_a_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    ctl(&path, &["status"]).assert_refused(&["socket", "does not exist", "--api-socket"]);
    fs::write(&path, "").unwrap();
    ctl(&path, &["status"]).assert_refused(&["nobody listens"]);
    fs::remove_file(&path).unwrap();
    die(UnixListener::bind(&path).unwrap(), &path);
    ctl(&path, &["status"]).assert_refused(&["nobody listens"]);
    fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let stranger = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("ctl connects");
        stream.write_all(b"+OK POP3 ready\r\n").expect("ctl reads");
        // Until ctl has gone.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    ctl(&path, &["status"]).assert_refused(&["no control socket"]);
    stranger.join().unwrap();
    ctl(&path, &["explode"]).assert_refused(&["explode"]);
}
