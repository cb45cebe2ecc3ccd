//! Probes of services that answer, answer wrongly, late, and not at all.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread::{self, JoinHandle};

use guest::request::{Answer, Request};

use super::*;
use crate::agent::testing::{Host, program};

fn probe(check: Check, timeout_ms: u64) -> Answer {
    Host::ask(&Request::Probe(Probe { check, timeout_ms })).answer()
}

fn unwell(check: Check, timeout_ms: u64) -> String {
    match probe(check, timeout_ms) {
        Answer::Unhealthy { message } => message,
        answer => panic!("{answer:?}"),
    }
}

/// A service that answers one request with these bytes and hangs up. It returns the request.
fn service(answer: &'static [u8]) -> (u16, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = vec![0; 4096];
        let count = stream.read(&mut request).unwrap();
        stream.write_all(answer).unwrap();
        String::from_utf8_lossy(&request[..count]).into_owned()
    };
    (port, thread::spawn(serve))
}

fn http(port: u16) -> Check {
    Check::Http { port, path: "/health?x=1".into() }
}

/// A port at which nobody listens.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_port_is_healthy_while_somebody_listens() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert_eq!(probe(Check::Tcp { port }, 10_000), Answer::Healthy);
    let port = free_port();
    let message = unwell(Check::Tcp { port }, 10_000);
    assert!(message.contains(&port.to_string()), "{message}");
}

#[test]
fn http_is_healthy_with_a_status_below_400() {
    for (answer, healthy) in [
        (&b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"[..], true),
        (b"HTTP/1.0 399 Odd\r\n\r\n", true),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", false),
        (b"HTTP/1.1 500 No\r\n\r\n", false),
        (b"HTTP/1.1 100\r\n\r\n", false),
        (b"SSH-2.0-OpenSSH\r\n", false),
        ("HTTP/1.1 2é0\r\n".as_bytes(), false),
        (b"", false),
    ] {
        let (port, service) = service(answer);
        assert_eq!(probe(http(port), 60_000) == Answer::Healthy, healthy, "{}", String::from_utf8_lossy(answer));
        let request = service.join().unwrap();
        assert!(request.starts_with("GET /health?x=1 HTTP/1.1\r\nHost: localhost\r\n"), "{request}");
    }
    assert!(unwell(http(free_port()), 10_000).contains("Nothing answers"));
}

#[test]
fn a_service_that_says_nothing_is_unhealthy_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let start = Instant::now();
    let message = unwell(http(listener.local_addr().unwrap().port()), 50);
    assert!(message.contains("No answer"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_path_that_would_be_more_than_a_path_is_refused() {
    for path in ["", "health", "/a b", "/a\r\nX: y"] {
        let message = unwell(Check::Http { port: 1, path: path.into() }, 1000);
        assert!(message.contains("no path"), "{message}");
    }
}

#[test]
fn a_program_is_healthy_with_zero_and_says_why_otherwise() {
    let exec = |line: &str| Check::Exec(program(&["sh", "-c", line]));
    assert_eq!(probe(exec("exit 0"), 60_000), Answer::Healthy);
    assert_eq!(
        unwell(exec("echo not yet; echo ' the database is down' >&2; exit 3"), 60_000),
        "The probe exited with 3: the database is down"
    );
    assert_eq!(unwell(exec("kill -9 $$"), 60_000), "Signal 9 ended the probe");
    assert!(unwell(Check::Exec(program(&["no-such-program"])), 60_000).contains("no-such-program"));
    // More than a pipe holds, and nobody who waits for it.
    assert_eq!(probe(exec("head -c 300000 /dev/zero"), 60_000), Answer::Healthy);
    assert_eq!(unwell(exec("sleep 1000"), 50), "The probe has not ended in time");
}
