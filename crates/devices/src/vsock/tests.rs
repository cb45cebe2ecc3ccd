//! The whole device, between a driver and processes with Unix sockets.

mod rig;

use super::connection::BUFFER;
use super::handler::MOST_CONNECTIONS;
use super::packet::{HEADER, Header, NO_RECEIVE, NO_SEND, NOTHING, op};
use super::*;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::thread;

use rig::{CID, EVENT, End, GUEST_PORT, ROOM, RX, Rig, TX};
use tempfile::TempDir;
use virtio::testing::Registers as _;

fn pattern(length: usize) -> Vec<u8> {
    (0u8..=250).cycle().take(length).collect()
}

fn rest(mut host: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    all
}

#[test]
fn a_client_of_the_host_reaches_a_port_of_the_guest() {
    let mut rig = Rig::new();
    let mut client = rig.client(b"CONNECT 52\nhello");
    let (header, _) = rig.next();
    assert_eq!((header.op, header.dst_port, header.buf_alloc), (op::REQUEST, 52, BUFFER));
    assert!(header.src_port >= 1 << 30);
    let mut end = End { guest: 52, ..End::new(header.src_port) };
    rig.send(end.packet(op::RESPONSE), &[]);
    let answer = format!("OK {}\n", end.host);
    let mut heard = vec![0; answer.len()];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(heard, answer.as_bytes());
    assert_eq!(rig.hear(&mut end, 5), b"hello");
    rig.say(&mut end, b"world");
    let mut heard = [0; 5];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"world");
    drop(client);
    assert_eq!(rig.expect(op::SHUTDOWN, &mut end).flags, NOTHING);
    rig.send(end.packet(op::RST), &[]);
    rig.assert_works();
}

#[test]
fn the_guest_reaches_a_socket_by_its_port_and_nothing_else() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let (mut end, mut host) = rig.open(&listener);
    rig.say(&mut end, b"hello");
    host.write_all(b"world").unwrap();
    assert_eq!(rig.hear(&mut end, 5), b"world");
    rig.send(Header { flags: NOTHING, ..end.packet(op::SHUTDOWN) }, &[]);
    rig.expect(op::RST, &mut end);
    assert_eq!(rest(&host), b"hello");
    let mut nowhere = End::new(53);
    rig.send(nowhere.packet(op::REQUEST), &[]);
    rig.expect(op::RST, &mut nowhere);
    rig.assert_works();
}

#[test]
fn a_port_where_the_guest_does_not_listen_ends_the_client() {
    let mut rig = Rig::new();
    let client = rig.client(b"CONNECT 52\n");
    let (header, _) = rig.next();
    rig.send(End { guest: 52, ..End::new(header.src_port) }.packet(op::RST), &[]);
    assert_eq!(rest(&client), b"");
    rig.assert_works();
}

#[test]
fn a_client_that_leaves_before_the_answer_is_forgotten_with_a_reset() {
    let mut rig = Rig::new();
    let client = rig.client(b"CONNECT 52\n");
    let (header, _) = rig.next();
    drop(client);
    let mut end = End { guest: 52, ..End::new(header.src_port) };
    rig.expect(op::RST, &mut end);
    rig.send(end.packet(op::RESPONSE), &[]);
    rig.expect(op::RST, &mut end);
    rig.assert_works();
}

#[test]
fn a_client_that_asks_wrongly_is_sent_away() {
    let mut rig = Rig::new();
    for line in ["CONNECT x\n", "GET / HTTP/1.1\r\n", "CONNECT 4294967296\n", &"x".repeat(32), "\n"] {
        assert_eq!(rest(&rig.client(line.as_bytes())), b"", "{line:?}");
    }
    // In pieces, it is understood.
    let mut client = rig.client(b"CONN");
    client.write_all(b"ECT 5").unwrap();
    client.write_all(b"2\n").unwrap();
    assert_eq!(rig.next().0.dst_port, 52);
}

#[test]
fn each_direction_can_end_on_its_own() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    // The host first.
    let (mut end, mut host) = rig.open(&listener);
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.hear(&mut end, 10), b"last words");
    assert_eq!(rig.expect(op::SHUTDOWN, &mut end).flags, NO_SEND);
    rig.say(&mut end, b"answer");
    rig.send(Header { flags: NO_SEND, ..end.packet(op::SHUTDOWN) }, &[]);
    assert_eq!(rest(&host), b"answer");
    assert_eq!(rig.expect(op::SHUTDOWN, &mut end).flags, NOTHING);
    rig.send(end.packet(op::RST), &[]);
    // The guest first.
    let (mut end, mut host) = rig.open(&listener);
    rig.say(&mut end, b"question");
    rig.send(Header { flags: NO_SEND, ..end.packet(op::SHUTDOWN) }, &[]);
    assert_eq!(rest(&host), b"question");
    host.write_all(b"reply").unwrap();
    assert_eq!(rig.hear(&mut end, 5), b"reply");
    rig.send(Header { flags: NO_RECEIVE, ..end.packet(op::SHUTDOWN) }, &[]);
    rig.expect(op::RST, &mut end);
    assert_eq!(host.write_all(b"too late").unwrap_err().kind(), ErrorKind::BrokenPipe);
    rig.assert_works();
}

#[test]
fn a_reader_who_stops_costs_the_others_nothing_and_gets_everything_at_the_end() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let (mut slow, host) = rig.open(&listener);
    let (probe, _other) = rig.open_from(&listener, GUEST_PORT + 1);
    let mut said = Vec::new();
    // As much as a guest may send that keeps to its credit.
    while slow.room > 0 {
        let data = pattern((slow.room as usize).min(8 << 10));
        rig.say(&mut slow, &data);
        said.extend(data);
        slow.room = slow.room.saturating_sub(8 << 10);
        for update in rig.others(&probe) {
            assert_eq!((update.op, update.dst_port), (op::CREDIT_UPDATE, slow.guest));
            slow.room = update.buf_alloc - (slow.sent - update.fwd_cnt);
        }
    }
    assert!(said.len() > BUFFER as usize);
    rig.assert_works();
    // The guest closes; its port is free at once, and nothing is lost.
    rig.send(Header { flags: NOTHING, ..slow.packet(op::SHUTDOWN) }, &[]);
    rig.expect(op::RST, &mut slow);
    let (mut again, other) = rig.open(&listener);
    assert!(rest(&host) == said);
    rig.say(&mut again, b"x");
    let mut heard = [0];
    (&other).read_exact(&mut heard).unwrap();
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let (end, host) = rig.open(&listener);
    let (probe, _other) = rig.open_from(&listener, GUEST_PORT + 1);
    let piece = pattern(32 << 10);
    // The host's socket takes some, the buffer the rest, and then it is too much.
    let sent = (1..64).find(|_| {
        rig.send(end.packet(op::RW), &piece);
        rig.others(&probe).iter().any(|header| (header.op, header.dst_port) == (op::RST, end.guest))
    });
    assert!(sent.is_some_and(|sent| sent * piece.len() > BUFFER as usize), "{sent:?}");
    let heard = rest(&host);
    assert!(heard.len() <= sent.unwrap() * piece.len() && piece.starts_with(&heard[..100]));
    rig.assert_works();
}

#[test]
fn the_host_waits_for_the_guests_credit_and_asks_for_it_once() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut end = End::new(52);
    let with_room = |end: &End, op, room| Header { buf_alloc: room, ..end.packet(op) };
    rig.send(with_room(&end, op::REQUEST, 10), &[]);
    rig.expect(op::RESPONSE, &mut end);
    let mut host = listener.accept().unwrap().0;
    host.write_all(b"0123456789abcdefghij").unwrap();
    assert_eq!(rig.hear(&mut end, 10), b"0123456789");
    rig.expect(op::CREDIT_REQUEST, &mut end);
    // A guest that claims to have read more than it got has no room; one that shrinks its buffer neither.
    end.received += 1;
    rig.send(with_room(&end, op::CREDIT_UPDATE, 100), &[]);
    end.received -= 2;
    rig.send(with_room(&end, op::CREDIT_UPDATE, 0), &[]);
    rig.assert_works();
    end.received += 1;
    rig.send(with_room(&end, op::CREDIT_UPDATE, 5), &[]);
    assert_eq!(rig.hear(&mut end, 5), b"abcde");
    // The host leaves with something unread: the guest gets it, and then the end.
    drop(host);
    rig.expect(op::CREDIT_REQUEST, &mut end);
    rig.send(with_room(&end, op::CREDIT_UPDATE, 100), &[]);
    assert_eq!(rig.hear(&mut end, 5), b"fghij");
    assert_eq!(rig.expect(op::SHUTDOWN, &mut end).flags, NOTHING);
}

#[test]
fn packets_to_nobody_are_reset_and_those_from_somebody_else_are_dropped() {
    let mut rig = Rig::new();
    let mut end = End::new(52);
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, u16::MAX] {
        rig.send(end.packet(op), b"data");
        rig.expect(op::RST, &mut end);
    }
    rig.send(Header { kind: 2, ..end.packet(op::REQUEST) }, &[]);
    rig.expect(op::RST, &mut end);
    rig.send(Header { dst_cid: 7, ..end.packet(op::REQUEST) }, &[]);
    assert_eq!(rig.next().0.src_cid, 7);
    rig.send(end.packet(op::RST), &[]);
    for src_cid in [0, 2, 4, CID | 1 << 32] {
        rig.send(Header { src_cid, ..end.packet(op::REQUEST) }, &[]);
    }
    rig.assert_works();
}

#[test]
fn what_a_connection_does_not_allow_ends_it() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    for op in [op::REQUEST, op::RESPONSE, 0, 8] {
        let (mut end, host) = rig.open(&listener);
        rig.send(end.packet(op), &[]);
        rig.expect(op::RST, &mut end);
        assert_eq!(rest(&host), b"");
    }
    let (mut end, host) = rig.open(&listener);
    rig.send(Header { flags: NO_SEND, ..end.packet(op::SHUTDOWN) }, &[]);
    rig.say(&mut end, b"one more thing");
    rig.expect(op::RST, &mut end);
    assert_eq!(rest(&host), b"");
    rig.assert_works();
}

#[test]
fn packets_that_are_none_are_faults() {
    let fault = |break_it: fn(&mut Rig)| {
        let mut rig = Rig::without_buffers();
        break_it(&mut rig);
        rig.driver.wait_for_needs_reset();
    };
    fault(|rig| {
        rig.driver.send(TX, &[&[0; HEADER - 1]], &[]);
    });
    let lie = |len| Header { len, ..End::new(52).packet(op::RW) }.encode();
    let lies = [lie(5), lie(u32::MAX)];
    for lie in lies {
        let mut rig = Rig::without_buffers();
        rig.driver.send(TX, &[&lie, b"four"], &[]);
        rig.driver.wait_for_needs_reset();
    }
    fault(|rig| {
        rig.driver.send(TX, &[], &[HEADER]);
    });
    fault(|rig| {
        rig.driver.send(RX, &[], &[HEADER - 1]);
        rig.driver.send(TX, &[&End::new(52).packet(op::REQUEST).encode()], &[]);
    });
    fault(|rig| {
        let listener = rig.listen(52);
        for _ in 0..2 {
            rig.driver.send(RX, &[], &[HEADER]);
        }
        rig.driver.send(TX, &[&End::new(52).packet(op::REQUEST).encode()], &[]);
        rig.driver.collect(RX);
        listener.accept().unwrap().0.write_all(b"data").unwrap();
        // The device reads no later than this, whether its end has gone or not.
    });
}

#[test]
fn a_guest_that_takes_no_resets_is_not_heard_until_it_does() {
    let mut rig = Rig::without_buffers();
    let bad = End::new(52).packet(op::RW).encode();
    let mut answered = 0;
    for _ in 0..600 {
        if rig.driver.rings[usize::from(TX)].next_available.wrapping_sub(answered) == QUEUE_SIZE {
            break;
        }
        rig.driver.send(TX, &[&bad], &[]);
        while rig.driver.try_collect(TX).is_some() {
            answered += 1;
        }
    }
    rig.driver.wait(Some(TX), "take what it has room for", |driver| {
        answered += u16::try_from(std::iter::from_fn(|| driver.try_collect(TX)).count()).unwrap();
        (answered == 256).then_some(())
    });
    for _ in 0..QUEUE_SIZE {
        rig.driver.send(RX, &[], &[ROOM]);
    }
    let sent = rig.driver.rings[usize::from(TX)].next_available;
    for _ in 0..sent {
        let (header, _) = rig.next();
        assert_eq!(header.op, op::RST);
    }
    rig.driver.wait(Some(TX), "take the rest", |driver| {
        answered += u16::try_from(std::iter::from_fn(|| driver.try_collect(TX)).count()).unwrap();
        (answered == sent).then_some(())
    });
    rig.assert_works();
}

#[test]
fn connections_are_bounded_and_come_back() {
    raise_descriptor_limit();
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut hosts = Vec::new();
    let mut end = End::new(52);
    for guest in 0..MOST_CONNECTIONS {
        end.guest = guest;
        rig.send(end.packet(op::REQUEST), &[]);
        rig.expect(op::RESPONSE, &mut end);
        hosts.push(listener.accept().unwrap().0);
    }
    end.guest = MOST_CONNECTIONS;
    rig.send(end.packet(op::REQUEST), &[]);
    rig.expect(op::RST, &mut end);
    // A client of the host's waits until there is room.
    let client = rig.client(b"CONNECT 7\n");
    end.guest = 5;
    rig.send(end.packet(op::RST), &[]);
    let (header, _) = rig.next();
    assert_eq!((header.op, header.dst_port), (op::REQUEST, 7));
    drop(client);
    end = End { guest: 7, ..End::new(header.src_port) };
    rig.expect(op::RST, &mut end);
    // One that the host has left, and to which the guest does not say so, makes room for the next one.
    end = End { guest: 5, ..End::new(52) };
    rig.send(end.packet(op::REQUEST), &[]);
    rig.expect(op::RESPONSE, &mut end);
    drop(hosts.swap_remove(0));
    end.guest = 0;
    rig.expect(op::SHUTDOWN, &mut end);
    let mut next = End { guest: MOST_CONNECTIONS, ..end };
    rig.send(next.packet(op::REQUEST), &[]);
    rig.expect(op::RST, &mut end);
    rig.expect(op::RESPONSE, &mut next);
}

/// Each connection has a descriptor on either side.
#[allow(unsafe_code, reason = "std cannot change limits")]
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives across the call.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    limit.rlim_cur = limit.rlim_max.min(1 << 14);
    // SAFETY: `limit` lives across the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
}

#[test]
fn a_reset_ends_all_connections_and_the_next_driver_finds_the_device_as_new() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let (_, host) = rig.open(&listener);
    let client = rig.client(b"CONNECT 7\n");
    assert_eq!(rig.next().0.op, op::REQUEST);
    rig.driver.reset();
    assert_eq!((rest(&host), rest(&client)), (vec![], vec![]));
    // One that comes while there is no driver waits.
    let _waiting = rig.client(b"CONNECT 8\n");
    rig.driver.boot(u64::MAX);
    for _ in 0..8 {
        rig.driver.send(RX, &[], &[ROOM]);
    }
    assert_eq!(rig.next().0.dst_port, 8);
    rig.assert_works();
}

#[test]
fn connections_live_on_while_somebody_looks_at_the_device() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let (mut end, mut host) = rig.open(&listener);
    rig.driver.registers.device.core().control(|_, handler| assert!(handler.is_some()));
    host.write_all(b"still here").unwrap();
    assert_eq!(rig.hear(&mut end, 10), b"still here");
}

#[test]
fn a_hundred_mebibytes_each_way_arrive_whole() {
    const LENGTH: usize = 100 << 20;
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let (mut end, host) = rig.open(&listener);
    let (mut reader, mut writer) = (host.try_clone().unwrap(), host);
    let echo = thread::spawn(move || std::io::copy(&mut reader, &mut writer));
    let said = pattern(251 << 8);
    let (mut at, mut heard) = (0, 0);
    while heard < LENGTH {
        while at < LENGTH && end.room > 0 && at - heard < 1 << 20 {
            let from = at % said.len();
            let length = (end.room as usize).min(said.len() - from).min(60 << 10).min(LENGTH - at);
            let ring = &rig.driver.rings[usize::from(TX)];
            if ring.next_available.wrapping_sub(ring.next_used) > 100 {
                break;
            }
            end.sent += u32::try_from(length).unwrap();
            end.room -= u32::try_from(length).unwrap();
            let header = Header { len: u32::try_from(length).unwrap(), ..end.packet(op::RW) };
            rig.driver.send(TX, &[&header.encode(), &said[from..from + length]], &[]);
            at += length;
        }
        while rig.driver.try_collect(TX).is_some() {}
        let (header, data) = rig.next();
        assert!(matches!(header.op, op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST), "{header:?}");
        end.room = header.buf_alloc - (end.sent - header.fwd_cnt);
        end.received += header.len;
        let from = heard % said.len();
        let (first, second) = data.split_at(data.len().min(said.len() - from));
        assert!(first == &said[from..from + first.len()] && second == &said[..second.len()], "at {heard}");
        heard += data.len();
        if header.op == op::CREDIT_REQUEST || end.received % (64 << 10) < header.len {
            rig.driver.send(TX, &[&end.packet(op::CREDIT_UPDATE).encode()], &[]);
        }
    }
    rig.driver.send(TX, &[&Header { flags: NOTHING, ..end.packet(op::SHUTDOWN) }.encode()], &[]);
    assert_eq!(usize::try_from(echo.join().unwrap().unwrap()).unwrap(), LENGTH);
}

#[test]
fn the_socket_is_private_and_takes_the_place_of_a_dead_one() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let spec: VsockSpec = kv::from_str(&format!("{},cid=9,id=s", path.display())).unwrap();
    let device = Vsock::new(&spec).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!((device.config(), spec.id()), (9u64.to_le_bytes().to_vec(), "s"));
    let fault = Vsock::new(&spec).err().expect("the path is taken").to_string();
    assert!(fault.contains("in use"), "{fault}");
    drop(device);
    assert!(!path.exists());
}

#[test]
fn what_cannot_be_is_refused_with_the_way_out() {
    for (text, cure) in [
        ("", "path=FILE"),
        (&*format!("/{}", "x".repeat(96)), "96 bytes or less"),
        ("/tmp/v,cid=2", "3 or more"),
        ("/tmp/v,cid=4294967295", "3 or more"),
    ] {
        let fault = Vsock::new(&kv::from_str(text).unwrap()).err().expect("it is refused").to_string();
        assert!(fault.contains(cure), "{text}: {fault}");
    }
}

#[test]
fn a_driver_that_goes_on_is_told_that_its_connections_are_gone() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let (_, host) = rig.open(&listener);
    let event = rig.driver.send(EVENT, &[], &[8]);
    let saved = rig.driver.save().unwrap();
    assert_eq!(rest(&host), b"");
    rig.driver.registers.resume();
    let told = rig.driver.collect(EVENT);
    assert_eq!((told.head, told.data.as_slice()), (event, [0; 4].as_slice()));
    rig.assert_works();
    let mut other = Rig::without_buffers();
    other.driver.reset();
    other.driver.load(&saved).unwrap();
    assert_eq!(other.driver.collect(EVENT).data, [0; 4]);
    other.assert_works();
}
