//! `vmm up` and its siblings: several machines from one file, with the small kernel, on the host's own programs.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use support::fleet::{Fleet, WEB, ask, free_port, kill, processes, until_answered};
use support::names::{ANSWER, with_name_server};
use support::until;

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

/// Tries an address of outside, names of outside, and one of the fleet.
const ASKS: &str = r#"
perl -MIO::Socket::INET -e 'print IO::Socket::INET->new(PeerAddr => $ARGV[0], Timeout => 9) ? "reaches\n" : "does not reach\n"' $1
getent ahostsv4 service.example || echo unknown
getent ahostsv4 lone || echo nobody
until getent ahostsv4 in; do sleep 1; done
echo done
sleep 1000
"#;

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
    fleet.down(running);
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
    fleet.assert_nothing_runs();
}

#[test]
#[ignore = "long: starts a fleet three times"]
fn killing_any_of_its_processes_ends_all_and_up_starts_afresh() {
    let port = free_port();
    let fleet = Fleet::new(&format!(
        "[services.web]\ncommand = ['sh', '-c', '{WEB}']\nmem = '64M'\nhealth = {{ tcp = 80 }}\npublish = ['{port}:80']\n"
    ));
    let running = fleet.up_to(&["web-1"]);
    until_answered(port, "shop-web-1");
    running.signal(Signal::KILL);
    fleet.assert_nothing_runs();
    drop(running);

    for process in ["exe init", "exe watch"] {
        let running = fleet.up_to(&["web-1"]);
        until_answered(port, "shop-web-1");
        kill(process);
        let ended = running.wait();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        fleet.assert_nothing_runs();
    }
}

#[test]
#[ignore = "long: starts three machines"]
fn an_ordinary_user_has_a_fleet_as_root_has() {
    let port = free_port();
    let services = format!(
        "[services.web]\ncommand = ['sh', '-c', '{WEB}']\nmem = '64M'\nhealth = {{ tcp = 80 }}\npublish = ['{port}:80']\n\
         volumes = ['kept:/kept']\ndisks = ['disk:1M']\n\
         [services.asks]\ncommand = ['sh', '-c', 'busybox wget -q -O - http://web/; blockdev --getsize64 /dev/vda; sleep 1000']\n\
         mem = '64M'\nallow = ['web:80']\ndisks = ['other:2M']\ndepends_on = {{ web = 'healthy' }}\n\
         [services.stranger]\ncommand = ['sh', '-c', 'busybox wget -q -T 5 -O - http://web/ || echo refused; sleep 1000']\n\
         mem = '64M'\ndepends_on = {{ web = 'healthy' }}\n"
    );
    let fleet = Fleet::new(&services).by_an_ordinary_user(&services);
    let running = fleet.up_to(&["web-1"]);
    let output = running.stdout();
    let asked = output.wait_for("asks-1 | shop-web-1\n", 0);
    output.wait_for("asks-1 | 2097152\n", asked);
    output.wait_for("stranger-1 | refused", 0);
    until_answered(port, "shop-web-1");
    fleet.down(running);
    assert!(Path::new(&fleet.path("data/vmm/volumes/shop/disk.img")).exists(), "disks outlive it");
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
    fleet.assert_nothing_runs();
}

#[test]
#[ignore = "long: starts two machines"]
fn names_and_addresses_of_outside_are_for_those_who_were_let_there() {
    let here = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a port is free");
    // Which of the host's addresses has the default route: nothing is sent.
    let route = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a port is free");
    route.connect((ANSWER, 9)).expect("there is a default route");
    let address = route.local_addr().expect("it has one").ip();
    let port = here.local_addr().expect("it has a port").port();
    let service = |more: &str| {
        format!(
            "command = ['sh', '/here/asks.sh', '{address}:{port}']\nmem = '64M'\nvolumes = ['.:/here:ro']\n{more}\n"
        )
    };
    let fleet = Fleet::new("[services.none]\ncommand = ['true']\n");
    fs::write(fleet.path("shop/asks.sh"), ASKS).expect("there is room for files");
    fleet.write(&format!("[services.in]\n{}[services.out]\n{}", service(""), service("internet = true")));
    let wrapper = with_name_server(Path::new(&fleet.path("shop")));
    let fleet = fleet.by(wrapper);
    let running = fleet.up();
    let output = running.stdout();
    output.wait_for("out-1 | done", 0);
    output.wait_for("in-1 | done", 0);
    let text = output.text(0);
    let said = |name: &str| text.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>().join("\n");
    let (out, within) = (said("out-1 | "), said("in-1 | "));
    assert!(out.contains("| reaches") && out.contains(&format!("| {ANSWER} ")) && out.contains("| nobody"), "{out}");
    assert!(within.contains("| does not reach") && within.contains("| unknown"), "{within}");
    assert!(!within.contains(&ANSWER.to_string()), "{within}");
    fleet.down(running);
}

#[test]
#[ignore = "long: starts two machines"]
fn a_published_port_of_udp_leads_to_all_machines() {
    let port = free_port();
    let echo = r#"use Sys::Hostname; use IO::Socket::INET;
        my $socket = IO::Socket::INET->new(LocalPort => 7000, Proto => "udp") or die $!;
        while (defined $socket->recv(my $words, 100)) { $socket->send(hostname() . " heard " . $words); }"#;
    let fleet = Fleet::new(&format!(
        "[services.echo]\ncommand = [\"perl\", \"-e\", \"{}\"]\nmem = '64M'\nreplicas = 2\n\
         publish = ['{port}:7000/udp']\n",
        in_toml(echo)
    ));
    fleet.done(&["up", "--detach"]);
    let mut answered = BTreeSet::new();
    until("an answer of both machines", || {
        // Each client is led to the next machine.
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
        client.set_read_timeout(Some(Duration::from_secs(2))).expect("it is a time");
        let mut answer = [0; 100];
        // A port that nobody listens at yet refuses.
        let heard = client
            .connect((Ipv4Addr::LOCALHOST, port))
            .and_then(|()| client.send(b"hello"))
            .and_then(|_| client.recv(&mut answer));
        if let Ok(length) = heard {
            answered.insert(String::from_utf8_lossy(&answer[..length]).into_owned());
        }
        answered.len() == 2
    });
    assert_eq!(answered.into_iter().collect::<Vec<_>>(), ["shop-echo-1 heard hello", "shop-echo-2 heard hello"]);
    fleet.done(&["down"]);
    fleet.assert_nothing_runs();
}

#[test]
#[ignore = "long: starts 16 machines"]
fn sixteen_machines_run_at_once_and_each_answers() {
    let port = free_port();
    let fleet = Fleet::new(&format!(
        "[services.web]\ncommand = ['sh', '-c', '{WEB}']\nmem = '64M'\nreplicas = 16\npublish = ['{port}:80']\n\
         health = {{ tcp = 80, interval = '30s', timeout = '30s' }}\n"
    ));
    let names: Vec<String> = (1..=16).map(|index| format!("web-{index}")).collect();
    let running = fleet.up_to(&names.iter().map(String::as_str).collect::<Vec<_>>());
    // Each connection is led to the next one.
    let answered: BTreeSet<String> = (0..16).filter_map(|_| ask(port, "/").ok()).collect();
    assert_eq!(answered.len(), 16, "{answered:?}");
    assert_eq!(fleet.count("web", "healthy"), 16);
    fleet.down(running);
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
    fleet.assert_nothing_runs();
}
