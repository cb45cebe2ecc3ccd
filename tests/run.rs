//! `vmm run`: commands in machines of their own, with the small kernel.

mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use support::names::{ANSWER, with_name_server};
use support::process::Vmm;
use support::project::{OURS, Project, assert_said};
use support::pty::Pty;
use support::{asset, vmm};

#[test]
fn a_command_has_the_host_s_programs_its_folder_and_nothing_secret() {
    let project = Project::new();
    fs::write(project.path("here/input"), "from the host\n").expect("there is room for files");
    let script = "cat input; echo from the guest > output; echo to stderr >&2; \
                  ls -d /etc/shadow /etc/ssh /home/* /root/* /var/lib/* 2>/dev/null; \
                  touch /usr/bin/thrown-away && test -e /usr/bin/thrown-away && id -u && hostname; exit 42";
    let ended = project.run(&["--name", "builder", "--", "sh", "-c", script]);
    assert_eq!(ended.stdout, "from the host\n0\nbuilder\n");
    assert_eq!((ended.stderr.as_str(), ended.code), ("to stderr\n", Some(42)));
    assert_eq!(fs::read_to_string(project.path("here/output")).expect("it is there"), "from the guest\n");
    assert!(!Path::new("/usr/bin/thrown-away").exists());
    project.assert_clean();
}

#[test]
fn input_and_output_are_the_command_s_byte_for_byte() {
    let project = Project::new();
    let input: Vec<u8> = (0..1_000_003u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(project.path("here/in"), &input).expect("there is room for files");
    let ended = project.vmm("exec \"$@\" < in > out", &["--interactive", "--", "cat"]).run();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(fs::read(project.path("here/out")).expect("it is there") == input);
}

#[test]
fn a_reader_that_goes_ends_the_command_and_the_machine() {
    let project = Project::new();
    let script = "{ \"$@\"; echo $? > code; } | head -n 1";
    let ended = project.vmm(script, &["--", "yes"]).run();
    assert_eq!(ended.stdout, "y\n");
    assert_eq!(fs::read_to_string(project.path("here/code")).expect("it is there"), "141\n");
    project.assert_clean();
}

#[test]
fn a_command_that_does_not_come_to_run_has_the_code_that_container_tools_give_it() {
    let project = Project::new();
    assert_said(&project.run(&["--", "no-such-program"]), 127, &["no-such-program"]);
    assert_said(&project.run(&["--", "/etc/passwd"]), 126, &["/etc/passwd"]);
    assert_said(&project.run(&["--user", "nobody-knows", "--", "true"]), OURS, &["nobody-knows"]);
    assert_eq!(project.run(&["--", "sh", "-c", "kill -9 $$"]).code, Some(137));
}

#[test]
fn an_installed_kernel_is_the_one_that_runs_have() {
    let project = Project::new();
    let data = format!("XDG_DATA_HOME={}", project.path("data"));
    let kernel = asset("small-vmlinux").into_os_string().into_string().expect("a path of text");
    let vmm = |arguments: &[&str]| Vmm::new(arguments).by(&["env", "--chdir", &project.path("here"), &data]).run();
    let refused = vmm(&["kernel", "install", "/etc/passwd"]);
    assert_eq!((refused.code, refused.stderr.contains("/etc/passwd")), (Some(2), true), "{refused:?}");
    let installed = vmm(&["kernel", "install", &kernel]);
    assert_eq!((installed.code, installed.stdout.contains("data/vmm/kernel")), (Some(0), true), "{installed:?}");
    assert_eq!(vmm(&["run", "--", "true"]).code, Some(0));
}

#[test]
#[ignore = "long: boots a stock kernel"]
fn a_distribution_s_kernel_comes_with_the_modules_of_its_package() {
    let project = Project::new();
    let package = asset("debian-6.1");
    let release = fs::read_dir(package.join("lib/modules")).expect("it is there").next().expect("a kernel has modules");
    let release = release.expect("it can be listed").file_name().into_string().expect("a release is text");
    // A package of what a run needs: all of it takes its time here.
    let script = "set -e; mkdir -p tree/DEBIAN tree/boot tree/lib/modules/$1; cp $0/boot/vmlinuz-$1 tree/boot/
        cd $0/lib/modules/$1; cp --parents -r modules.builtin modules.order kernel/drivers/virtio kernel/fs/fuse \
            kernel/fs/overlayfs kernel/net/vmw_vsock $OLDPWD/tree/lib/modules/$1; cd $OLDPWD
        printf 'Package: kernel\nVersion: 1\nArchitecture: amd64\nMaintainer: x <x@y.z>\nDescription: x\n' > tree/DEBIAN/control
        dpkg-deb --build -Znone tree kernel.deb >/dev/null";
    let mut build = Command::new("sh");
    let built = build.args(["-c", script]).arg(&package).arg(&release).current_dir(project.path("here"));
    assert!(built.status().expect("there is a shell").success());
    let data = format!("XDG_DATA_HOME={}", project.path("data"));
    let vmm = |arguments: &[&str]| project.about(arguments).by(&["env", &data]).run();
    let refused = vmm(&["kernel", "install", "here.deb"]);
    assert_eq!((refused.code, refused.stderr.contains("here.deb")), (Some(2), true), "{refused:?}");
    assert_eq!(vmm(&["kernel", "install", "kernel.deb"]).code, Some(0));
    let ended = vmm(&["run", "--network", "none", "--", "uname", "-r"]);
    assert_eq!((ended.code, ended.stdout.trim()), (Some(0), release.as_str()), "{ended:?}");
    // It has no card's module, which is told before anything starts.
    assert_said(&vmm(&["run", "--network", "user", "--", "true"]), OURS, &["virtio_net", "--kernel"]);
    project.assert_clean();
}

#[test]
fn what_cannot_be_run_is_refused_in_one_line() {
    let project = Project::new();
    assert_said(&project.run(&["true"]), OURS, &["true"]);
    assert_said(&project.run(&["--"]), OURS, &["not provided: <COMMAND>"]);
    assert_said(&project.run(&["--volume", "/srv", "--", "true"]), OURS, &["--volume", "HOST:GUEST"]);
    assert_said(&project.run(&["--rootfs", "/nonexistent", "--", "true"]), OURS, &["/nonexistent"]);
    assert_said(&project.run(&["--mem", "12Q", "--", "true"]), OURS, &["--mem"]);
    assert_said(&project.run(&["--tty", "--", "true"]), OURS, &["--tty"]);
    assert_said(&project.vmm("cd / && \"$@\"", &["--", "true"]).run(), OURS, &["home", "--volume", "--workdir"]);
    let no_kernel = Vmm::new(["run", "--", "true"])
        .by(&["env", "--chdir", &project.path("here"), "XDG_DATA_HOME=/nonexistent"])
        .run();
    assert_said(&no_kernel, OURS, &["/nonexistent/vmm/kernel", "--kernel"]);
    project.assert_clean();
}

#[test]
fn a_guest_whose_kernel_panics_is_a_failure_of_ours_with_its_last_words() {
    let project = Project::new();
    let ended = project.run(&["--mem", "40M", "--", "true"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(OURS), ""), "{ended:?}");
    assert!(ended.stderr.contains("vmm run: "), "{ended:?}");
}

#[test]
fn a_signal_is_the_command_s() {
    let project = Project::new();
    let script = "trap 'echo heard; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let running = project.vmm("exec \"$@\"", &["--", "sh", "-c", script]).spawn();
    running.stdout().wait_for("ready", 0);
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(7), "ready\nheard\n"));
    project.assert_clean();
}

#[test]
fn a_command_at_a_terminal_has_one_of_the_same_size_and_ours_is_left_as_it_was() {
    let project = Project::new();
    let mut pty = Pty::open();
    pty.set_unusual_mode();
    pty.resize(33, 99);
    let before = pty.modes();
    let arguments = ["--interactive", "--tty", "--", "sh", "-c", "stty size; read line; echo got $line; exit 3"];
    let running = project.vmm("exec \"$@\"", &arguments).spawn_at(&pty);
    let seen = pty.screen.wait_for("33 99", 0);
    assert!(pty.is_raw());
    pty.send("words\r");
    pty.screen.wait_for("got words", seen);
    assert_eq!(running.wait().code, Some(3));
    assert_eq!(pty.modes(), before);
}

/// Listens in the guest, says so, and answers one client; then tries to connect to the address that is its argument.
const SERVICE: &str = r#"use IO::Socket::INET; $| = 1;
    my $service = IO::Socket::INET->new(LocalPort => 8000, Listen => 5) or die $!;
    print "ready\n";
    my $client = $service->accept; my $line = <$client>; print $client "heard $line"; close $client;
    my $host = IO::Socket::INET->new(PeerAddr => $ARGV[0], Timeout => 20);
    print $host ? "connected\n" : "not connected\n";"#;

#[test]
fn a_published_port_leads_to_the_command_and_this_host_is_out_of_its_reach() {
    let project = Project::new();
    let here = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a port is free");
    let free = here(0).local_addr().expect("it has a port").port();
    let private = here(0);
    let gateway = format!("10.0.2.2:{}", private.local_addr().expect("it has a port").port());
    let publish = format!("{free}:8000");
    let words = ["--publish", &publish, "--workdir", "/", "--", "perl", "-e", SERVICE, &gateway];
    let running = project.vmm("exec \"$@\"", &words).spawn();
    running.stdout().wait_for("ready", 0);
    let mut answer = String::new();
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, free)).expect("the port is published");
    stream.write_all(b"hello\n").and_then(|()| stream.read_to_string(&mut answer)).expect("the command answers");
    assert_eq!(answer, "heard hello\n");
    let ended = running.wait();
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "ready\nnot connected\n"), "{}", ended.stderr);
    project.assert_clean();
}

#[test]
fn a_command_has_an_address_and_a_name_server_or_nothing_but_itself() {
    let project = Project::new();
    let mut wrapper = with_name_server(project.folder.path());
    // The script is one word of the shell's.
    wrapper[4] = format!("'{}'", wrapper[4]);
    let script = "cat /etc/resolv.conf; ls /sys/class/net; hostname -i; getent ahostsv4 service.example";
    let words = ["--network", "user", "--workdir", "/", "--", "sh", "-c", script];
    let ended = project.vmm(&format!("exec {} \"$@\"", wrapper.join(" ")), &words).run();
    let expected = format!("nameserver 10.0.2.3\neth0\nlo\n10.0.2.15\n{ANSWER} ");
    assert!(ended.stdout.starts_with(&expected), "{ended:?}");
    let ended = project.run(&["--network", "none", "--workdir", "/", "--", "ls", "/sys/class/net"]);
    assert_eq!(ended.stdout, "lo\n", "{}", ended.stderr);
    assert_said(&project.run(&["--network", "none", "-p", "80:80", "--", "true"]), OURS, &["--publish"]);
    assert_said(&project.run(&["-p", "80", "--", "true"]), OURS, &["HOST:GUEST"]);
    assert_said(&project.run(&["--network", "host", "--", "true"]), OURS, &["user", "none"]);
}

#[test]
fn a_folder_can_be_the_root_and_what_is_written_there_is_thrown_away() {
    let project = Project::new();
    let (root, data) = (project.path("root"), project.path("data"));
    for folder in ["bin", "proc", "sys", "dev", "run"] {
        fs::create_dir_all(Path::new(&root).join(folder)).expect("there is room for files");
    }
    fs::create_dir(&data).expect("there is room for files");
    fs::copy(vmm(), Path::new(&root).join("bin/vmm")).expect("there is room for files");
    // It is the only program there, and static: what it writes is a file below the root.
    let log =
        |path: &str| ["--rootfs", &root, "--", "/bin/vmm", "--kernel", "/none", "--log-file", path].map(str::to_owned);
    let log = log("/log");
    let ended = project.run(&log.each_ref().map(String::as_str));
    assert_eq!(
        (ended.code, ended.stderr.contains("/dev/kvm") || ended.stderr.contains("/none")),
        (Some(2), true),
        "{ended:?}"
    );
    assert!(!Path::new(&root).join("log").exists());

    let volume = format!("{data}:/data:ro");
    let ended = project.run(&[
        "--rootfs",
        &root,
        "--volume",
        &volume,
        "--",
        "/bin/vmm",
        "--kernel",
        "/none",
        "--log-file",
        "/data/log",
    ]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("/data/log") && ended.stderr.contains("Read-only"), "{ended:?}");
}
