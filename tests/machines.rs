//! Machines in the background: what other commands do with them by their names.

mod support;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};

use rustix::process::Signal;
use support::process::Ended;
use support::project::{OURS, Project};

/// A machine in the background, which ends with its project.
struct Behind {
    project: Project,
}

impl Behind {
    /// Named `web`, with a script that says `ready` when it is.
    fn new(script: &str) -> Self {
        let behind = Self { project: Project::new() };
        let ended = behind.project.run(&["--detach", "--name", "web", "--network", "none", "--", "sh", "-c", script]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "web\n"), "{ended:?}");
        behind
    }

    fn ask(&self, arguments: &[&str]) -> Ended {
        self.project.about(arguments).run()
    }

    /// What a command prints that goes well.
    #[track_caller]
    fn answer(&self, arguments: &[&str]) -> String {
        let ended = self.ask(arguments);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{arguments:?}: {ended:?}");
        ended.stdout
    }

    /// Asserts that something is refused, in one line that has these words.
    #[track_caller]
    fn assert_refused(&self, arguments: &[&str], code: i32, words: &[&str]) {
        let ended = self.ask(arguments);
        assert_eq!((ended.code, ended.stderr.lines().count()), (Some(code), 1), "{arguments:?}: {ended:?}");
        assert!(words.iter().all(|word| ended.stderr.contains(word)), "{arguments:?}: {ended:?}");
    }

    /// Waits for a line of the command's.
    fn wait_for(&self, line: &str) {
        let follows = self.project.about(&["logs", "--follow", "web"]).spawn();
        follows.stdout().wait_for(line, 0);
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.ask(&["rm", "--force", "web"]);
    }
}

/// Ends when it is asked to, with a code of its own.
const SERVICE: &str = "trap 'echo stopped; exit 5' TERM; trap 'echo again' USR1; echo trouble >&2; echo ready; \
                       while :; do sleep 0.1; done";

#[test]
fn a_machine_in_the_background_is_known_by_its_name_until_it_is_removed() {
    let web = Behind::new(SERVICE);
    web.wait_for("ready");
    let table = web.answer(&["ps"]);
    assert!(table.starts_with("NAME") && table.contains("web") && table.contains("up ") && table.contains("sh -c"));
    let logs = web.ask(&["logs", "web"]);
    assert_eq!((logs.code, logs.stdout.as_str(), logs.stderr.as_str()), (Some(0), "ready\n", "trouble\n"));
    let mut again = web.project.run(&["--name", "web", "--", "true"]);
    assert_eq!((again.code, again.stderr.contains("vmm stop web")), (Some(OURS), true), "{again:?}");
    web.assert_refused(&["rm", "web"], 1, &["web", "--force"]);

    assert_eq!(web.answer(&["kill", "--signal", "USR1", "web"]), "web\n");
    web.wait_for("again");
    let waits = web.project.about(&["wait", "web"]).spawn();
    assert_eq!(web.answer(&["stop", "web"]), "web\n");
    assert_eq!(waits.wait().stdout, "5\n");
    assert_eq!(web.answer(&["wait", "web"]), "5\n");
    assert!(web.ask(&["logs", "--tail", "1", "web"]).stdout.ends_with("stopped\n"));
    assert!(!web.answer(&["ps"]).contains("web"));
    let all = web.answer(&["ps", "--all"]);
    assert!(all.contains("ended (5)"), "{all}");
    web.assert_refused(&["exec", "web", "true"], OURS, &["web", "ended"]);
    let runtime = fs::read_dir(web.project.path("runtime/vmm/web")).expect("it is there");
    let left: Vec<_> = runtime.map(|entry| entry.expect("it is there").file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("vsock")), "{left:?}");

    assert_eq!(web.answer(&["rm", "web"]), "web\n");
    web.assert_refused(&["logs", "web"], 1, &["web", "vmm ps --all"]);
    web.project.assert_clean();
    // A name that was used is free again.
    again = web.project.run(&["--name", "web", "--", "true"]);
    assert_eq!(again.code, Some(0), "{again:?}");
}

#[test]
fn more_commands_run_beside_the_first_with_streams_and_codes_of_their_own() {
    let web = Behind::new(SERVICE);
    let script = "cat; id -u; pwd; echo $WORD; echo trouble >&2; exit 3";
    let words = ["exec", "-i", "-u", "65534", "-w", "/tmp", "-e", "WORD=word", "web", "sh", "-c", script];
    let mut exec = web.project.about(&words).spawn();
    exec.send("from the host\n");
    exec.close_input();
    let ended = exec.wait();
    assert_eq!(ended.stdout, "from the host\n65534\n/tmp\nword\n");
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(3), "trouble\n"));
    web.assert_refused(&["exec", "web", "no-such-program"], 127, &["vmm exec: ", "no-such-program"]);
    web.assert_refused(&["exec", "other", "true"], OURS, &["vmm exec: ", "other"]);
    web.assert_refused(&["exec", "-t", "web", "true"], OURS, &["--tty"]);
    web.assert_refused(&["exec", "../web", "true"], OURS, &["no name"]);

    let exec =
        web.project.about(&["exec", "web", "sh", "-c", "trap 'exit 9' INT; echo here; while :; do sleep 0.1; done"]);
    let running = exec.spawn();
    running.stdout().wait_for("here", 0);
    running.signal(Signal::INT);
    assert_eq!(running.wait().code, Some(9));
    // The machine's end is an exec's end, too.
    let running = web.project.about(&["exec", "web", "sh", "-c", "echo here; sleep 1000"]).spawn();
    running.stdout().wait_for("here", 0);
    assert_eq!(web.answer(&["kill", "web"]), "web\n");
    assert_eq!(running.wait().code, Some(OURS));
}

#[test]
#[ignore = "long: boots a guest"]
fn files_are_copied_both_ways_and_stay_where_they_belong() {
    let web = Behind::new(SERVICE);
    let tree = web.project.path("here/tree/deep");
    fs::create_dir_all(&tree).expect("there is room for files");
    fs::write(format!("{tree}/file"), vec![7; 3 << 20]).expect("there is room for files");
    assert_eq!(web.answer(&["cp", "tree", "web:/tmp"]), "");
    assert_eq!(
        web.answer(&["exec", "web", "sh", "-c", "wc -c < /tmp/tree/deep/file; echo more > /tmp/tree/more"]),
        "3145728\n"
    );
    assert_eq!(web.answer(&["cp", "web:/tmp/tree", "back"]), "");
    let back = |name: &str| fs::read(web.project.path(&format!("here/back/{name}"))).expect("it came back");
    assert!(back("deep/file") == vec![7; 3 << 20] && back("more") == b"more\n");
    web.assert_refused(&["cp", "nothing", "web:/tmp"], 1, &["nothing"]);
    web.assert_refused(&["cp", "web:/nothing", "."], 1, &["/nothing"]);
    web.assert_refused(&["cp", "tree", "web:relative"], 1, &["relative", "slash"]);
    web.assert_refused(&["cp", "a", "b"], 1, &["NAME:/PATH"]);
}

#[test]
fn a_machine_whose_process_was_killed_is_dead_and_leaves_what_can_be_read() {
    let web = Behind::new(SERVICE);
    web.wait_for("ready");
    let follows = web.project.about(&["logs", "--follow", "web"]).spawn();
    assert_eq!(web.answer(&["kill", "web"]), "web\n");
    assert_eq!(follows.wait().stdout, "ready\n");
    let table = web.answer(&["ps"]);
    assert!(table.contains("dead"), "{table}");
    assert!(fs::metadata(web.project.path("runtime/vmm/web/vsock")).is_err());
    web.assert_refused(&["wait", "web"], 1, &["web", "killed"]);
    web.assert_refused(&["stop", "web"], 1, &["dead", "vmm rm web"]);
    assert!(web.ask(&["logs", "--console", "web"]).code == Some(0));
    assert_eq!(web.answer(&["rm", "web"]), "web\n");
    web.project.assert_clean();
}

#[test]
#[ignore = "long: waits for a time to be over"]
fn a_command_that_ignores_sigterm_is_stopped_when_its_time_is_over() {
    let web = Behind::new("trap '' TERM; echo ready; while :; do sleep 0.1; done");
    web.wait_for("ready");
    assert_eq!(web.answer(&["stop", "--time", "1", "web"]), "web\n");
    assert_eq!(web.answer(&["wait", "web"]), "137\n");
}

#[test]
#[ignore = "long: starts five machines"]
fn what_does_not_come_to_run_in_the_background_says_so_and_leaves_nothing() {
    let project = Project::new();
    for (words, code, said) in [
        (&["-d", "--", "no-such-program"][..], 127, "no-such-program"),
        (&["-d", "--mem", "40M", "--", "true"], OURS, "vmm run: "),
        (&["-d", "--tty", "--", "true"], OURS, "--tty"),
        (&["-d", "--name", "a/b", "--", "true"], OURS, "a/b"),
    ] {
        let ended = project.run(words);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), ""), "{words:?}: {ended:?}");
        assert!(ended.stderr.contains(said), "{words:?}: {ended:?}");
    }
    let ended = project.run(&["-d", "--rm", "--name", "short", "--", "true"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    // It is either still there, or has left nothing.
    project.about(&["wait", "short"]).run();
    project.assert_clean();
}

#[test]
#[ignore = "long: boots a guest"]
fn a_machine_s_use_is_shown_and_served_to_prometheus() {
    let web = Behind::new(SERVICE);
    let table = web.answer(&["stats"]);
    assert!(table.starts_with("NAME") && table.contains("web"), "{table}");
    let text = web.answer(&["stats", "--prometheus", "web"]);
    let resident = text.lines().find_map(|line| line.strip_prefix("vmm_resident_bytes{machine=\"web\"} "));
    assert!(resident.and_then(|bytes| bytes.parse::<u64>().ok()).is_some_and(|bytes| bytes > 1 << 20), "{text}");

    let serves = web.project.about(&["stats", "--prometheus=127.0.0.1:0"]).spawn();
    let line = serves.stderr.wait_for("/metrics", 0);
    let said = serves.stderr.text(0);
    assert!(line > 0, "{said}");
    let address = said.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect("an address");
    let address: SocketAddrV4 = address.parse().expect("an address");
    assert_eq!(*address.ip(), Ipv4Addr::LOCALHOST);
    let ask = |request: &str| {
        let mut client = TcpStream::connect(address).expect("it listens");
        client.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        BufReader::new(&client)
            .read_line(&mut answer)
            .and_then(|_| client.read_to_string(&mut answer))
            .expect("it answers");
        answer
    };
    assert!(ask("GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
    assert!(ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.1 200 OK"));
    web.assert_refused(&["stats", "other"], 1, &["other"]);
}
