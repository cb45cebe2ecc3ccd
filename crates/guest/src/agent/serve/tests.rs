//! Connections that want the right thing, the wrong thing, and nothing.

use std::fs;
use std::io::Write as _;

use guest::copy::{Limits, receive, send};
use guest::frame::Kind;

use super::*;
use crate::agent::testing::{Host, program, reaper, shell};

fn failed(host: &Host) -> String {
    match host.answer() {
        Answer::Failed { message } => message,
        answer => panic!("{answer:?}"),
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("the folder's name is UTF-8").to_owned()
}

#[test]
fn files_and_folders_go_in_and_come_out_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("tree/sub")).unwrap();
    fs::create_dir(at("back")).unwrap();
    let bytes = vec![7; 1 << 20];
    fs::write(at("tree/sub/file"), &bytes).unwrap();

    let host = Host::ask(&Request::Put { path: text(&at("guest")) });
    send(&at("tree"), &mut &host.stream).unwrap();
    assert_eq!(host.answer(), Answer::Done { skipped: 0 });
    assert!(fs::read(at("guest/sub/file")).unwrap() == bytes);

    let host = Host::ask(&Request::Get { path: text(&at("guest")) });
    receive(&at("back"), &mut &host.stream, Limits::NONE).unwrap();
    assert_eq!(host.answer(), Answer::Done { skipped: 0 });
    assert!(fs::read(at("back/guest/sub/file")).unwrap() == bytes);
}

#[test]
fn a_copy_that_fails_in_the_guest_says_why_though_the_host_still_sends() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), vec![7; 8 << 20]).unwrap();
    let host = Host::ask(&Request::Put { path: "/no/such/folder/file".into() });
    // It is taken to its end, or the answer would be lost with it.
    send(&folder.path().join("file"), &mut &host.stream).unwrap();
    assert!(failed(&host).contains("/no/such/folder"));
    let host = Host::ask(&Request::Get { path: "/no/such/file".into() });
    let error = receive(folder.path(), &mut &host.stream, Limits::NONE).unwrap_err();
    assert!(error.to_string().contains("/no/such/file"), "{error}");
    for request in [Request::Put { path: "a".into() }, Request::Get { path: "a".into() }] {
        assert!(failed(&Host::ask(&request)).contains("slash"));
    }
}

#[test]
fn what_is_not_understood_is_answered_and_the_connection_ends() {
    for message in [r#""dance""#, r#"{"put":{"path":"/a","owner":1}}"#, r#"{"exec":{}}"#, "{", ""] {
        let host = Host::connect();
        frame::write_frame(&mut &host.stream, Kind::Message, message.as_bytes()).unwrap();
        assert!(failed(&host).contains("not understood"));
        assert_eq!(host.frame(), None);
    }
    for bytes in [&[9, 0, 0, 0, 0][..], &[0, 255, 255, 255, 255], &[5, 0, 0, 0, 0]] {
        let host = Host::connect();
        (&host.stream).write_all(bytes).unwrap();
        failed(&host);
        assert_eq!(host.frame(), None);
    }
}

#[test]
fn a_connection_too_many_is_told_so() {
    // An agent of its own: other tests have connections too.
    let agent = Arc::new(Agent::new(Arc::clone(reaper()), false));
    let connect = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        agent.accept(File::from(OwnedFd::from(theirs)));
        Host { stream: ours }
    };
    let mut hosts: Vec<Host> = (0..MOST).map(|_| connect()).collect();
    assert!(failed(&connect()).contains("256"));
    // With the end of one there is room for another.
    hosts.pop().unwrap().stream.shutdown(std::net::Shutdown::Both).unwrap();
    let mut busy = agent.busy.lock().unwrap();
    while *busy == MOST {
        busy = agent.changed.wait(busy).unwrap();
    }
    drop(busy);
    let host = connect();
    host.say(&Request::Exec(shell("exit 9")));
    assert_eq!(host.listen().end, Some(Answer::Exited { code: 9 }));
}

#[test]
fn orphans_are_waited_for_too() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    // The process whose parent is gone prints its number, and ends.
    let said = Host::exec(guest::request::Exec {
        program: program(&["sh", "-c", "(sh -c 'echo $$; exit 5' &)"]),
        ..Default::default()
    })
    .listen();
    let pid = String::from_utf8(said.out).unwrap().trim().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let start = Instant::now();
    // A zombie still has a number.
    while rustix::process::test_kill_process(pid).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(60), "nobody has waited for {pid:?}");
        thread::yield_now();
    }
}
