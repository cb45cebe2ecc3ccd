//! `vmm up` and its siblings: several machines from one file, with the small kernel, on the host's own programs.

mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use rustix::process::Signal;
use support::process::{Ended, Running, Vmm};
use support::{asset, until};
use tempfile::TempDir;

/// A fleet's file in a folder of its own, and the folders that it makes files in.
struct Fleet {
    folder: Rc<TempDir>,
}

/// How often it is asked what only an answer tells.
const PACE: Duration = Duration::from_millis(300);

/// A web server that says who it is, at port 80.
const WEB: &str = "mkdir -p /tmp/w; echo $(hostname) $SAYS > /tmp/w/index.html; exec busybox httpd -f -p 80 -h /tmp/w";

impl Fleet {
    fn new(services: &str) -> Self {
        let fleet = Self { folder: Rc::new(tempfile::tempdir().expect("there is room for files")) };
        for name in ["shop", "runtime"] {
            fs::create_dir(fleet.path(name)).expect("there is room for files");
        }
        fleet.write(services);
        fleet
    }

    /// Makes the file another one.
    fn write(&self, services: &str) {
        let text = format!("kernel = '{}'\n{services}", asset("small-vmlinux").display());
        fs::write(self.path("shop/fleet.toml"), text).expect("there is room for files");
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).into_os_string().into_string().expect("a path of text")
    }

    fn vmm(&self, words: &[&str]) -> Vmm {
        let (runtime, data) =
            (format!("XDG_RUNTIME_DIR={}", self.path("runtime")), format!("XDG_DATA_HOME={}", self.path("data")));
        let folder = self.path("shop");
        Vmm::new(words).with(&self.folder).by(&["env", "--chdir", &folder, &runtime, &data])
    }

    fn up(&self) -> Running {
        self.vmm(&["up"]).spawn()
    }

    /// Runs a verb that must succeed.
    #[track_caller]
    fn done(&self, words: &[&str]) -> Ended {
        let ended = self.vmm(words).run();
        assert_eq!(ended.code, Some(0), "{words:?}: {ended:?}");
        ended
    }

    /// The machines of a service that are in this state.
    fn count(&self, service: &str, state: &str) -> usize {
        let ended = self.vmm(&["services"]).run();
        let of = |line: &&str| line.starts_with(&format!("shop-{service}-")) && line.ends_with(&format!("  {state}"));
        ended.stdout.lines().filter(of).count()
    }

    fn wait_for(&self, service: &str, count: usize, state: &str) {
        until(&format!("{service} {state}: {count}"), || {
            let is = self.count(service, state) == count;
            std::thread::sleep(if is { Duration::ZERO } else { PACE });
            is
        });
    }
}

/// What is answered at a port of this host.
fn get(port: u16) -> String {
    let mut answer = String::new();
    if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
        let _ = stream.write_all(b"GET / HTTP/1.0\r\n\r\n").and_then(|()| stream.read_to_string(&mut answer));
    }
    answer.lines().last().unwrap_or_default().to_owned()
}

/// Waits for an answer that begins with `words`, at the pace of somebody who waits: the guests need the processor more.
fn until_answered(port: u16, words: &str) {
    until(&format!("the answer {words:?}"), || {
        let answered = get(port).starts_with(words);
        std::thread::sleep(if answered { Duration::ZERO } else { PACE });
        answered
    });
}

/// A port that nobody has.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    listener.local_addr().expect("it has a port").port()
}

/// The processes whose command line contains `words`.
fn processes(words: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").expect("it is mounted").filter_map(Result::ok);
    let lines = entries.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    lines.filter(|line| line.replace('\0', " ").contains(words)).collect()
}

/// Nothing of a fleet is left that runs.
fn assert_nothing_runs() {
    for words in ["shop-", "exe init", "exe watch", "pasta", "dnsmasq", "virtiofsd"] {
        until(&format!("no process with {words:?}"), || processes(words).is_empty());
    }
    let taps = fs::read_dir("/sys/class/net").expect("it is mounted").filter_map(Result::ok);
    let left: Vec<_> =
        taps.map(|tap| tap.file_name()).filter(|name| name.to_string_lossy().starts_with("tap")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Claims the address that is its first argument for a MAC address of its own, by ARP (RFC 826), then tries TCP and UDP.
const ATTACK: &str = r#"
    my ($victim, $port) = @ARGV; $| = 1;
    open my $file, "<", "/sys/class/net/eth0/address"; my $mac = pack "H12", <$file> =~ tr/://dr;
    open $file, "<", "/sys/class/net/eth0/ifindex"; my $index = <$file> + 0;
    socket my $raw, 17, 3, 0x0608 or die $!;
    my $ip = pack "C4", split /\./, $victim;
    for my $sender ($mac, "\x02\0\0\0\0\1") { for my $operation (1, 2) {
        my $arp = pack "nnCCn", 1, 0x800, 6, 4, $operation;
        my $frame = "\xff" x 6 . $sender . "\x08\x06" . $arp . $sender . $ip . "\xff" x 6 . $ip;
        send $raw, $frame, 0, pack("SniSCC", 17, 0x0806, $index, 1, 0, 6) . "\xff" x 6 . "\0\0" or die $!;
    } }
    use IO::Socket::INET;
    my $tcp = IO::Socket::INET->new(PeerAddr => $victim, PeerPort => $port, Timeout => 4);
    print $tcp ? "tcp reaches\n" : "tcp does not reach\n";
    my $udp = IO::Socket::INET->new(PeerAddr => $victim, PeerPort => $port, Proto => "udp");
    $udp->send("from the stranger");
    print "attacked\n";"#;

/// Prints what comes by UDP.
const LISTEN: &str = r#"use IO::Socket::INET; $| = 1;
    my $socket = IO::Socket::INET->new(LocalPort => 80, Proto => "udp") or die $!;
    while (defined $socket->recv(my $words, 100)) { print "udp $words\n"; }"#;

/// As it stands in a text of TOML's, in one line.
fn in_toml(text: &str) -> String {
    text.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', " ")
}

#[test]
#[ignore = "long: starts four machines"]
fn services_reach_whom_they_may_and_nobody_else_by_any_address() {
    let port = free_port();
    // The database prints what comes by UDP; the application asks it again and again, and shows whom it takes for it.
    let fleet = Fleet::new(&format!(
        r#"
        [services.db]
        command = ["sh", "-c", "perl -e '{}' & {WEB}"]
        mem = "64M"
        health = {{ http = "/", port = 80 }}
        [services.app]
        command = ["sh", "-c", "busybox httpd -p 8080; while :; do bash -c 'echo -n from the app > /dev/udp/db/80'; busybox nc -w 3 db 80 < /dev/null && echo app reaches db; grep -v IP /proc/net/arp; sleep 1; done"]
        mem = "64M"
        allow = ["db:80", "db:80/udp"]
        publish = ["{port}:8080"]
        depends_on = {{ db = "healthy" }}
        [services.stranger]
        command = ["sh", "-c", "perl -e '{}' $(busybox nslookup db 10.89.0.3 | sed -n 's/^Address: //p' | tail -n 1) 80; busybox ping -c 1 -W 2 db || echo ping does not reach; sleep 1000"]
        mem = "64M"
        depends_on = {{ app = "started" }}
        "#,
        in_toml(LISTEN),
        in_toml(ATTACK)
    ));
    let running = fleet.up();
    let output = running.stdout();
    let first = output.wait_for("app-1 | app reaches db", 0);
    assert!(!output.text(0)[..first].contains("stranger-1 |"), "it waits for the application");
    let attacked = output.wait_for("stranger-1 | attacked", first);
    let refused = output.wait_for("stranger-1 | ping does not reach", attacked);
    let text = output.text(0);
    assert!(text.contains("stranger-1 | tcp does not reach"), "{text}");
    // After the attack the application still finds the database, and nobody has the stranger's address.
    let after = output.wait_for("app-1 | app reaches db", refused);
    output.wait_for("app-1 | app reaches db", after);
    let text = output.text(refused);
    let neighbours = text.lines().filter(|line| line.starts_with("app-1 | 10.89.")).map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words[2].to_owned(), words[5].to_owned())
    });
    for (address, mac) in neighbours.filter(|(address, _)| address != "10.89.0.3" && address != "10.89.0.2") {
        let number: Vec<u8> = address.split('.').skip(2).map(|part| part.parse().expect("an address")).collect();
        assert_eq!(mac, format!("02:00:00:00:{:02x}:{:02x}", number[0], number[1]));
    }
    output.wait_for("db-1 | udp from the app", 0);
    assert!(!output.text(0).contains("udp from the stranger"), "{}", output.text(0));
    fleet.done(&["down"]);
    let ended = running.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_nothing_runs();
}

#[test]
#[ignore = "long: changes a fleet several times"]
fn a_published_port_leads_to_all_machines_and_a_change_touches_what_has_changed() {
    let port = free_port();
    let services = |says: &str, more: &str| {
        format!(
            "[services.web]\ncommand = ['sh', '-c', '{WEB}']\nmem = '64M'\nreplicas = 2\nhealth = {{ tcp = 80 }}\n\
             publish = ['{port}:80']\nenv = {{ SAYS = '{says}' }}\nsecrets = {{ key = 'key' }}\n\
             [services.other]\ncommand = ['sh', '-c', 'ls -l /data > /data/$(hostname); sleep 1000']\nmem = '64M'\n\
             volumes = ['kept:/data']\n{more}"
        )
    };
    let fleet = Fleet::new(&services("one", ""));
    fs::write(fleet.path("shop/key"), "secret").expect("there is room for files");
    fleet.done(&["up", "--detach"]);
    let answers = |says: &str, indexes: &[u32]| {
        for index in indexes {
            until_answered(port, &format!("shop-web-{index} {says}"));
        }
    };
    answers("one", &[1, 2]);
    let lines = processes("--name shop-");
    assert!(lines.len() >= 3 && !lines.iter().any(|line| line.contains("secret\0")), "{lines:?}");
    let other = || processes("--name shop-other-1").concat();

    fleet.done(&["scale", "web=3"]);
    answers("one", &[1, 2, 3]);
    fleet.done(&["scale", "web=1"]);
    fleet.wait_for("web", 1, "healthy");
    let refused = fleet.vmm(&["scale", "wbe=3"]).run();
    assert_eq!((refused.code, refused.stderr.contains("`wbe`")), (Some(2), true), "{refused:?}");

    let before = other();
    fleet.write(&services("two", ""));
    fleet.done(&["up"]);
    answers("two", &[1, 2]);
    assert_eq!(other(), before, "nothing has changed there");
    let restarts = fleet.done(&["services", "--json"]).stdout;
    assert!(restarts.contains(r#""restarts":0"#) && !restarts.contains(r#""restarts":1"#), "{restarts}");

    fleet.done(&["down"]);
    assert!(Path::new(&fleet.path("data/vmm/volumes/shop/kept/shop-other-1")).exists(), "volumes outlive it");
    fleet.done(&["down", "--volumes"]);
    assert!(!Path::new(&fleet.path("data/vmm/volumes/shop")).exists());
    assert_nothing_runs();
}

#[test]
#[ignore = "long: starts a fleet twice"]
fn killing_any_of_its_processes_ends_all_and_up_starts_afresh() {
    let port = free_port();
    let fleet = Fleet::new(&format!(
        "[services.web]\ncommand = ['sh', '-c', '{WEB}']\nmem = '64M'\nhealth = {{ tcp = 80 }}\npublish = ['{port}:80']\n"
    ));
    let running = fleet.up();
    running.stderr.wait_for("web-1: it is healthy", 0);
    until_answered(port, "shop-web-1 ");
    running.signal(Signal::KILL);
    assert_nothing_runs();
    drop(running);

    let running = fleet.up();
    running.stderr.wait_for("web-1: it is healthy", 0);
    until_answered(port, "shop-web-1 ");
    let killed = std::process::Command::new("pkill").args(["-KILL", "-f", "exe watch"]).status();
    assert!(killed.expect("it runs").success());
    let ended = running.wait();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_nothing_runs();
}

#[test]
#[ignore = "long: starts a machine six times"]
fn a_machine_that_fails_again_and_again_is_given_up_with_its_last_lines() {
    let fleet = Fleet::new(
        "[services.panics]\ncommand = ['true']\nmem = '40M'\n\
         [services.after]\ncommand = ['echo', 'has', 'started']\nmem = '64M'\ndepends_on = { panics = 'started' }\n\
         [services.once]\ncommand = ['echo', 'once']\nmem = '64M'\n\
         [services.then]\ncommand = ['echo', 'then']\nmem = '64M'\ndepends_on = { once = 'completed' }\n",
    );
    let ended = fleet.vmm(&["up", "--detach"]).run();
    assert_eq!((ended.code, ended.stderr.contains("shop-panics-1")), (Some(1), true), "{ended:?}");
    fleet.wait_for("then", 1, "completed");
    fleet.wait_for("panics", 1, "given up");
    let said = fs::read_to_string(fleet.path("runtime/vmm/fleets/shop/output")).expect("it is there");
    assert!(said.contains("6 times in a row") && said.contains("is started again in 250ms"), "{said}");
    let shown = said.split("6 times in a row").nth(1).unwrap_or_default();
    assert!(shown.contains("vmm: panics-1:   vmm run: "), "{said}");
    assert_eq!(fleet.count("after", "waits"), 1);
    fleet.done(&["down"]);
    assert_nothing_runs();
}

#[test]
fn what_cannot_be_is_said_before_anything_starts() {
    let here = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let port = here.local_addr().expect("it has a port").port();
    let fleet = Fleet::new(&format!("[services.web]\ncommand = ['true']\npublish = ['{port}:80']\n"));
    fleet.vmm(&["up"]).run().assert_refused(&["web", &port.to_string(), "ss -lntup"]);
    fleet.done(&["check", "fleet.toml"]);
    fleet
        .write("[services.web]\ncommand = ['true']\ndepends_on = { db = 'started' }\n[services.x]\nimage = './none'\n");
    for verb in [&["check", "fleet.toml"][..], &["up"], &["up", "-d"]] {
        let ended = fleet.vmm(verb).run();
        assert_eq!((ended.code, ended.stderr.lines().count()), (Some(2), 2), "{ended:?}");
        assert!(ended.stderr.contains("fleet.toml: line 4: ") && ended.stderr.contains("`db`"), "{ended:?}");
        assert!(ended.stderr.contains("fleet.toml: line 6: ") && ended.stderr.contains("/none"), "{ended:?}");
    }
    fleet.vmm(&["down", "-f", "nowhere.toml"]).run().assert_refused(&["nowhere.toml"]);
    fleet.write("[services.web]\ncommand = ['true']\n");
    fleet.vmm(&["down"]).run().assert_refused(&["vmm up"]);
    assert_nothing_runs();
}
