//! A name server of the host's, which machines are to find.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;

/// What it answers.
pub(crate) const ANSWER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);

/// Starts it at 127.0.0.1, once a process. Returns the words that run a command where it is the host's only one; `folder`
/// has room for a file.
pub(crate) fn with_name_server(folder: &Path) -> Vec<String> {
    name_server();
    let resolver = folder.join("resolv.conf");
    fs::write(&resolver, "nameserver 127.0.0.1\n").expect("there is room for files");
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolver.display());
    ["unshare", "--mount", "sh", "-c", &script, "sh"].map(str::to_owned).to_vec()
}

/// Answers questions of the name system (RFC 1035, section 4) at a port of the host's: every name has one address.
fn name_server() {
    const HEADER: usize = 12;
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)).expect("nobody else serves names here");
    std::thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((length, peer)) = server.recv_from(&mut packet) {
            let question = &packet[HEADER.min(length)..length];
            let Some(end) = question.iter().position(|byte| *byte == 0) else { continue };
            let Some(question) = question.get(..end + 5) else { continue };
            let is_address = question[end + 1..end + 3] == [0, 1];
            let mut answer =
                [&packet[..2], &[0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0], question].concat();
            if is_address {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(ANSWER.octets());
            }
            server.send_to(&answer, peer).expect("the guest listens");
        }
    });
}
