//! `vmm-oci` as a program.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Command, Output};
use std::thread;

fn vmm_oci(arguments: &[&str]) -> Output {
    let cache = tempfile::tempdir().expect("there is room for files");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm-oci"));
    command.args(arguments).env("XDG_CACHE_HOME", cache.path()).env("HOME", cache.path());
    command.env_remove("REGISTRY_AUTH_FILE").output().expect("it is built")
}

#[test]
fn a_manifest_without_an_end_ends_the_program_and_not_the_host() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let reference = format!("{}/name", listener.local_addr().unwrap());
    let served = thread::spawn(move || {
        // The first one is a question about logins.
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let read = stream.read(&mut request).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").unwrap();
            if !request[..read].starts_with(b"GET /v2/ ") {
                let mut sent: u64 = 0;
                while stream.write_all(&[b' '; 1 << 16]).is_ok() {
                    sent += 1 << 16;
                }
                return sent;
            }
        }
        0
    });
    let output = vmm_oci(&["get", &reference]);
    assert!(!output.status.success(), "{output:?}");
    let sent = served.join().unwrap();
    assert!((1 << 20..1 << 30).contains(&sent), "{sent}");
}

#[test]
fn what_goes_wrong_is_one_line_or_one_object_for_vmm() {
    let output = vmm_oci(&["pull", "/nonexistent"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.starts_with("vmm image: there is no image at /nonexistent"), "{said}");
    let output = vmm_oci(&["get", "--", "debian"]);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(answer["error"].as_str().unwrap().contains("HOST/debian"), "{answer}");
    assert_eq!((output.status.code(), output.stderr), (Some(1), Vec::new()));
}
