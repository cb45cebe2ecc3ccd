//! The example fleets in `resources/fleets`, asked as clients would. Their programs are Debian's: nginx, HAProxy and
//! PostgreSQL.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::fleet::{Fleet, PACE, ask, free_port, kill};
use support::{asset, until};

fn at_port(text: &str, from: u16, to: u16) -> String {
    let from = format!("\"{from}:");
    assert!(text.contains(&from), "{text}");
    text.replace(&from, &format!("\"{to}:"))
}

/// The example with this name, which has a database: that is empty, and its disk is not blank.
fn example_with_database(name: &'static str, edit: impl FnOnce(String) -> String) -> Fleet {
    let fleet = Fleet::example(name, edit);
    let (disk, volumes) = (asset("database"), fleet.path(&format!("data/vmm/volumes/{name}")));
    fs::create_dir_all(&volumes).expect("there is room for files");
    let copied = Command::new("cp").arg("--sparse=always").arg(disk.join("data.img")).arg(volumes).status();
    assert!(copied.expect("there is such a program").success());
    fs::copy(disk.join("secret"), fleet.path(&format!("{name}/secret"))).expect("there is room for files");
    fleet
}

/// What is answered, which must not fail.
#[track_caller]
fn answer(port: u16) -> String {
    ask(port, "/").unwrap_or_else(|error| panic!("no answer at {port}: {error}"))
}

/// Of an answer of the application that counts: who, and what the database has counted.
#[track_caller]
fn counted(answer: &str) -> (String, u64) {
    let (who, count) = answer.split_once(' ').unwrap_or_else(|| panic!("{answer:?}"));
    (who.to_owned(), count.parse().unwrap_or_else(|_| panic!("{answer:?}")))
}

/// Asks until all of `who` have answered: each answer's first words, as long as `first` takes them.
fn until_all_answer(port: u16, who: &[&str], first: impl Fn(&str) -> String) {
    let mut left: BTreeSet<&str> = who.iter().copied().collect();
    until(&format!("answers of {who:?}"), || {
        left.remove(first(&answer(port)).as_str());
        thread::sleep(if left.is_empty() { Duration::ZERO } else { PACE / 3 });
        left.is_empty()
    });
}

/// Clients that ask at the same time.
const CLIENTS: u64 = 2;
const REQUESTS: u64 = 2000;
/// One that was killed is back by then, while all others have work to do.
const BACK: Duration = Duration::from_secs(400);
/// Services scaled up serve from all of their machines after that, on the emulated host's clock.
const SCALED: Duration = Duration::from_secs(30);

#[test]
#[ignore = "long: 2,000 requests, and eight starts of machines"]
fn no_request_fails_while_an_application_is_killed_and_comes_back() {
    let port = free_port();
    let fleet = example_with_database("balanced", |text| at_port(&text, 8080, port));
    let running = fleet.up_to(&["db-1", "app-1", "app-2", "app-3", "lb-1"]);
    let who = |answer: &str| counted(answer).0;
    until_all_answer(port, &["balanced-app-1", "balanced-app-2", "balanced-app-3"], who);

    let (asked, is_back) = (AtomicU64::new(0), AtomicBool::new(false));
    let counts = Mutex::new(BTreeSet::new());
    let start = Instant::now();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                loop {
                    let enough = asked.fetch_add(1, Ordering::Relaxed) >= REQUESTS;
                    if enough && is_back.load(Ordering::Relaxed) {
                        break;
                    }
                    // One that starts needs the processor more.
                    thread::sleep(if enough { PACE } else { Duration::ZERO });
                    let (_, count) = counted(&answer(port));
                    counts.lock().expect("no client panics").insert(count);
                }
            });
        }
        while asked.load(Ordering::Relaxed) <= REQUESTS / 4 {
            assert!(!running.ends_within(PACE) && start.elapsed() < BACK, "{}", running.stderr.text(0));
        }
        kill("--name balanced-app-1 ");
        until("one machine less", || fleet.count("app", "healthy") == 2);
        let back = "app-1: it is healthy";
        while running.stderr.text(0).matches(back).count() < 2 {
            assert!(!running.ends_within(PACE) && start.elapsed() < BACK, "{}", running.stderr.text(0));
        }
        is_back.store(true, Ordering::Relaxed);
    });
    let counts = counts.into_inner().expect("no client panics");
    println!("{} requests in {:?}", counts.len(), start.elapsed());
    assert!(counts.len() as u64 >= REQUESTS, "each has a number of its own from the database");
    until_all_answer(port, &["balanced-app-1"], who);

    let start = Instant::now();
    fleet.done(&["scale", "app=5"]);
    let all: Vec<String> = (1..=5).map(|index| format!("balanced-app-{index}")).collect();
    until_all_answer(port, &all.iter().map(String::as_str).collect::<Vec<_>>(), who);
    let took = start.elapsed();
    println!("all five serve after {took:?}");
    assert!(took <= SCALED, "{took:?}");
    fleet.down(running);
}

#[test]
#[ignore = "long: starts a machine twice"]
fn one_server_has_all_and_its_data_outlives_it() {
    let port = free_port();
    let fleet = example_with_database("one-server", |text| at_port(&text, 8080, port));
    let running = fleet.up_to(&["server-1"]);
    let (who, first) = counted(&answer(port));
    assert_eq!(who, "one-server-server-1");
    assert!(counted(&answer(port)).1 > first);
    let processes = fleet.done(&["exec", "one-server-server-1", "ps", "-e", "-o", "comm="]).stdout;
    assert!(["nginx", "perl", "postgres"].iter().all(|name| processes.contains(name)), "{processes}");
    fleet.down(running);
    let running = fleet.up_to(&["server-1"]);
    assert!(counted(&answer(port)).1 > first + 1, "it counts on");
    fleet.down(running);
}

/// Tries to reach the database, and shows what a client of PostgreSQL says.
const PG_ISREADY: &str = "/usr/lib/postgresql/15/bin/pg_isready -t 5 -h";

#[test]
#[ignore = "long: starts three machines"]
fn a_database_apart_is_reached_by_its_application_and_by_nobody_else() {
    let port = free_port();
    let stranger = "[services.stranger]\ncommand = ['sleep', '1000']\nmem = '64M'\n";
    let fleet = example_with_database("apart", |text| format!("{}\n{stranger}", at_port(&text, 8080, port)));
    let running = fleet.up_to(&["db-1", "app-1"]);
    let (who, first) = counted(&answer(port));
    assert_eq!((who.as_str(), counted(&answer(port)).1 > first), ("apart-app-1", true));

    let services = fleet.done(&["services"]).stdout;
    let database = services.lines().find_map(|line| line.strip_prefix("apart-db-1 ")).expect("it runs");
    let address = database.split_whitespace().next().expect("it has an address");
    let tries = |machine: &str, at: &str| {
        let script = format!("{PG_ISREADY} {at}");
        let ended = fleet.vmm(&["exec", machine, "sh", "-c", &script]).run();
        (ended.code, ended.stdout.trim().to_owned())
    };
    for at in ["db", address] {
        assert_eq!(tries("apart-app-1", at), (Some(0), format!("{at}:5432 - accepting connections")));
        assert_eq!(tries("apart-stranger-1", at), (Some(2), format!("{at}:5432 - no response")));
    }
    let here = Command::new("sh").args(["-c", &format!("{PG_ISREADY} {address}")]).output();
    assert_eq!(here.expect("there is a shell").status.code(), Some(2), "nor from the host");
    // Nor is there anything else that the stranger reaches, or that the application reaches of the database.
    let connect = |machine: &str, to: &str| {
        let script =
            format!("perl -MIO::Socket::INET -e 'exit !IO::Socket::INET->new(PeerAddr => q({to}), Timeout => 3)'");
        fleet.vmm(&["exec", machine, "sh", "-c", &script]).run().code == Some(0)
    };
    assert!(!connect("apart-stranger-1", "app:8000"));
    fleet.done(&["exec", "apart-db-1", "sh", "-c", "busybox nc -l -p 5433 < /dev/null > /dev/null 2>&1 &"]);
    assert!(!connect("apart-app-1", "db:5433") && connect("apart-app-1", "db:5432"));
    fleet.down(running);
}

#[test]
#[ignore = "long: starts a machine"]
fn processes_inside_of_one_server_take_turns_and_one_is_killed_without_a_failure() {
    let port = free_port();
    let fleet = Fleet::example("inside", |text| at_port(&text, 8080, port));
    let running = fleet.up_to(&["server-1"]);
    let number = |answer: &str| answer.split(' ').nth(1).unwrap_or_default().to_owned();
    until_all_answer(port, &["8001", "8002", "8003"], number);
    let process_of = |wanted: &str| {
        let mut found = String::new();
        until(&format!("an answer of {wanted}"), || {
            let answer = answer(port);
            found = answer.rsplit(' ').next().unwrap_or_default().to_owned();
            number(&answer) == wanted
        });
        found
    };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let asks = scope.spawn(|| {
            let mut requests = 0;
            while !stop.load(Ordering::Relaxed) {
                answer(port);
                requests += 1;
            }
            requests
        });
        for _ in 0..3 {
            let before = process_of("8002");
            fleet.done(&["exec", "inside-server-1", "pkill", "-KILL", "-f", "app.pl 8002"]);
            until("another process", || process_of("8002") != before);
        }
        stop.store(true, Ordering::Relaxed);
        println!("{} requests meanwhile", asks.join().expect("each request is answered"));
    });
    fleet.down(running);
}

#[test]
#[ignore = "long: boots a stock kernel"]
fn two_worlds_have_kernels_of_their_own_and_talk_to_each_other() {
    let (newer, older) = (free_port(), free_port());
    let fleet = Fleet::example("two-worlds", |text| at_port(&at_port(&text, 8080, newer), 8081, older));
    let package = asset("debian-6.1");
    let modules = package.join("lib/modules");
    let release = fs::read_dir(&modules).expect("it is there").next().expect("a kernel has modules");
    let release = release.expect("it can be listed").file_name().into_string().expect("a release is text");
    let link = |from: &Path, to: &str| symlink(from, fleet.path(to)).expect("there is room for files");
    link(&asset("small-vmlinux"), "two-worlds/kernel-6.12");
    link(&asset("debian-6.1-vmlinuz"), "two-worlds/kernel-6.1");
    fs::create_dir_all(fleet.path("data/vmm")).expect("there is room for files");
    link(&modules, "data/vmm/modules");
    let running = fleet.up_to(&["old-1", "new-1"]);
    let old = answer(older);
    assert_eq!(old, format!("Linux {release}"));
    let new = answer(newer);
    assert!(new.starts_with("Linux 6.12.") && new.ends_with(&format!("\nold: {old}")), "{new}");
    fleet.down(running);
}
