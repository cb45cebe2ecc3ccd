//! The whole device from the driver's side, over real taps, each test in a network namespace of its own.

mod peer;
mod user;

use super::*;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use virtio::testing::{self, DEADLINE, Driver, MmioRegisters, Registers as _, Used};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const RX: u16 = 0;
const TX: u16 = 1;
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Says in which process of a test's we are.
const STAGE: &str = "NET_TEST_STAGE";

type Guest = Driver<MmioRegisters<Net>>;

/// Runs `body` in a process of its own, behind `wrap`, which is this test again. Whether this is that process.
fn alone(path: &str, stage: &str, wrap: &[&str]) -> bool {
    if std::env::var(STAGE).is_ok_and(|now| now == stage) {
        return true;
    }
    let mut command = Command::new(wrap[0]);
    command.args(&wrap[1..]).arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", path, "--nocapture"]).env(STAGE, stage).output().unwrap();
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{said}{wrong}");
    false
}

/// The name of a test in this file as the harness has it.
fn path_of(test: &str) -> String {
    format!("{}::{test}", module_path!().split_once("::").unwrap().1)
}

fn in_namespace(test: &str, body: impl FnOnce()) {
    in_namespace_of(&path_of(test), body);
}

/// Runs a test, by its path in the crate, in a network namespace that has a bridge `br0` and nobody who speaks unasked.
pub(crate) fn in_namespace_of(path: &str, body: impl FnOnce()) {
    if alone(path, "namespace", &["unshare", "--map-root-user", "--net"]) {
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        ip("link add br0 type bridge mcast_snooping 0");
        ip("link set br0 up");
        body();
    }
}

fn ip(arguments: &str) {
    assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
}

fn spec(text: &str) -> NetSpec {
    kv::from_str(text).unwrap()
}

fn open(text: &str) -> Net {
    Net::open(&spec(&format!("{text},mac=02:00:00:00:00:01")), None, None).unwrap()
}

fn refusal(text: &str) -> String {
    format!("{:#}", Net::open(&spec(text), None, None).err().expect("it is refused"))
}

/// A card on the bridge, its guest with all features, and its counts.
fn card(more: &str) -> (Guest, Arc<Traffic>) {
    let net = open(&format!("tap0,bridge=br0,vhost=off{more}"));
    let traffic = net.traffic();
    let mut guest = testing::mmio(net);
    guest.boot(u64::MAX);
    (guest, traffic)
}

/// Another tap on the bridge, which takes frames as they are.
struct Peer(File);

impl Peer {
    fn new() -> Self {
        let tap = Tap::open("peer", &spec("peer,bridge=br0")).unwrap().queues.remove(0);
        tap::prepare(&tap, 0, feature::OFFLOADS).unwrap();
        Self(tap)
    }

    fn send(&self, header: [u8; HEADER], frame: &[u8]) {
        (&self.0).write_all(&[&header, frame].concat()).unwrap();
    }

    fn receive(&self) -> ([u8; HEADER], Vec<u8>) {
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, self.0.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        let limit = i32::try_from(DEADLINE.as_millis()).unwrap();
        assert_eq!(epoll.wait(limit, &mut [EpollEvent::default()]).unwrap(), 1, "no frame came in time");
        let mut data = vec![0; LARGEST];
        let length = (&self.0).read(&mut data).unwrap();
        data.truncate(length);
        let frame = data.split_off(HEADER);
        (data.try_into().unwrap(), frame)
    }
}

fn frame(to: [u8; 6], from: [u8; 6], seed: u8, length: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x88, 0xb5]].concat();
    frame.extend((0..length - 14).map(|at| u8::try_from(at % 251).unwrap() ^ seed));
    frame
}

/// A TCP segment that is to be cut, and its header.
fn large(length: usize) -> ([u8; HEADER], Vec<u8>) {
    let mut frame = frame(GUEST, PEER, 7, length);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame[16..18].copy_from_slice(&u16::try_from(length - 14).unwrap().to_be_bytes());
    seal(&mut frame);
    frame[34..54].copy_from_slice(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    // NEEDS_CSUM, TCPV4, hdr_len 54, gso_size 1448, csum_start 34, csum_offset 16.
    ([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], frame)
}

/// The checksum of an IPv4 header, which some bridges verify.
fn seal(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let words = frame[14..34].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[24..26].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
}

fn transmit(guest: &mut Guest, frame: &[u8]) {
    guest.send(TX, &[&[0; HEADER], frame], &[]);
}

fn num_buffers(used: &Used) -> u16 {
    u16::from_le_bytes([used.data[10], used.data[11]])
}

fn wait_for(traffic: &Traffic, what: impl Fn(&Traffic) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !what(traffic) {
        assert!(Instant::now() < deadline, "{traffic:?}");
        std::thread::yield_now();
    }
}

#[test]
fn frames_go_both_ways_and_the_device_says_who_it_is() {
    in_namespace("frames_go_both_ways_and_the_device_says_who_it_is", || {
        let (mut guest, traffic) = card(",mtu=1400");
        let peer = Peer::new();
        let mut config = [0; 12];
        guest.registers.device.core().read_config(0, &mut config);
        assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x78, 5]);
        assert_eq!(sys::mtu("tap0").unwrap(), 1400);
        for seed in 0..100 {
            let there = frame(PEER, GUEST, seed, 60 + usize::from(seed));
            transmit(&mut guest, &there);
            assert_eq!(peer.receive().1, there);
            assert_eq!(guest.collect(TX).written, 0);
            let back = frame(GUEST, PEER, seed, 1000 + usize::from(seed));
            guest.send(RX, &[], &[1526]);
            peer.send([0; HEADER], &back);
            let used = guest.collect(RX);
            assert_eq!((&used.data[HEADER..], num_buffers(&used)), (&back[..], 1));
        }
        assert_eq!((traffic.rx.frames(), traffic.tx.frames()), (100, 100));
        assert_eq!((traffic.rx.dropped(), traffic.tx.dropped()), (0, 0));
    });
}

#[test]
fn a_large_frame_fills_several_buffers_and_the_rest_stay_for_the_next() {
    in_namespace("a_large_frame_fills_several_buffers_and_the_rest_stay_for_the_next", || {
        let (mut guest, _) = card("");
        let peer = Peer::new();
        for _ in 0..20 {
            guest.add(RX, &[], &[4000, 96]);
        }
        guest.kick(RX);
        let (header, segment) = large(60_000);
        peer.send(header, &segment);
        let first = guest.collect(RX);
        let count = num_buffers(&first);
        assert_eq!(usize::from(count), (HEADER + 60_000).div_ceil(4096));
        assert_eq!(first.data[..10], header[..10]);
        let mut got = first.data[HEADER..].to_vec();
        for _ in 1..count {
            got.extend(guest.collect(RX).data);
        }
        assert_eq!(got, segment);
        let small = frame(GUEST, PEER, 3, 100);
        peer.send([0; HEADER], &small);
        assert_eq!(guest.collect(RX).data[HEADER..], small);
    });
}

#[test]
fn a_frame_without_enough_buffers_waits_for_more_and_loses_nothing() {
    in_namespace("a_frame_without_enough_buffers_waits_for_more_and_loses_nothing", || {
        let (mut guest, traffic) = card("");
        let peer = Peer::new();
        let (header, frame) = large(30_000);
        let mut got = Vec::new();
        guest.add(RX, &[], &[2048]);
        guest.send(RX, &[], &[2048]);
        peer.send(header, &frame);
        for _ in 0..4 {
            guest.send(RX, &[], &[2048]);
        }
        assert_eq!(guest.try_collect(RX), None);
        guest.send(RX, &[], &[32 << 10]);
        let first = guest.collect(RX);
        let count = num_buffers(&first);
        got.extend(&first.data[HEADER..]);
        for _ in 1..count {
            got.extend(guest.collect(RX).data);
        }
        assert_eq!(got, frame);
        assert_eq!(traffic.rx.dropped(), 0);
    });
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_and_one_too_long_is_dropped() {
    in_namespace("without_mergeable_buffers_a_frame_takes_one_and_one_too_long_is_dropped", || {
        let net = open("tap0,bridge=br0,vhost=off");
        let traffic = net.traffic();
        let mut guest = testing::mmio(net);
        guest.boot(!feature::MRG_RXBUF);
        let peer = Peer::new();
        guest.add(RX, &[], &[HEADER, 500]);
        guest.send(RX, &[], &[HEADER, 500]);
        peer.send([0; HEADER], &frame(GUEST, PEER, 1, 501));
        wait_for(&traffic, |traffic| traffic.rx.dropped() == 1);
        for seed in [2, 3] {
            let fits = frame(GUEST, PEER, seed, 500);
            peer.send([0; HEADER], &fits);
            let used = guest.collect(RX);
            assert_eq!((&used.data[HEADER..], num_buffers(&used)), (&fits[..], 1));
        }
    });
}

#[test]
fn hostile_frames_are_dropped_and_counted_and_the_next_one_goes() {
    in_namespace("hostile_frames_are_dropped_and_counted_and_the_next_one_goes", || {
        let (mut guest, traffic) = card("");
        let peer = Peer::new();
        let good = frame(PEER, GUEST, 1, 100);
        let long = vec![0; testing::BUFFER];
        // GSO of a kind that does not exist, segments of no length, a checksum behind the end.
        let headers = [[0, 0x77, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0]];
        guest.send(TX, &[&[0; HEADER - 1]], &[]);
        guest.send(TX, &[&[0; HEADER], &[0; 13]], &[]);
        guest.send(TX, &[&long, &long], &[]);
        for header in &headers {
            guest.send(TX, &[header, &good], &[]);
        }
        for _ in 0..5 {
            guest.collect(TX);
        }
        assert_eq!((traffic.tx.dropped(), traffic.tx.frames()), (5, 0));
        transmit(&mut guest, &good);
        assert_eq!(peer.receive().1, good);
    });
}

#[test]
fn a_buffer_that_nothing_can_be_received_into_is_a_fault() {
    in_namespace("a_buffer_that_nothing_can_be_received_into_is_a_fault", || {
        let peer = Peer::new();
        let (mut guest, _) = card("");
        // No room at all, and in mergeable buffers too little for the header.
        guest.send(RX, &[&[0; 100]], &[]);
        peer.send([0; HEADER], &frame(GUEST, PEER, 1, 60));
        guest.wait_for_needs_reset();
        guest.boot(u64::MAX);
        for _ in 0..40 {
            guest.add(RX, &[], &[11]);
        }
        guest.kick(RX);
        peer.send([0; HEADER], &frame(GUEST, PEER, 1, 60));
        guest.wait_for_needs_reset();
        guest.boot(u64::MAX);
        transmit(&mut guest, &frame(PEER, GUEST, 1, 60));
        peer.receive();
    });
}

#[test]
fn a_frame_with_a_false_address_does_not_leave() {
    in_namespace("a_frame_with_a_false_address_does_not_leave", || {
        let (mut guest, traffic) = card(",guest-ip=10.0.0.2");
        let peer = Peer::new();
        let mut packet = large(200).1;
        packet[..12].copy_from_slice(&[PEER, GUEST].concat());
        transmit(&mut guest, &packet);
        packet[26..30].copy_from_slice(&[10, 0, 0, 2]);
        seal(&mut packet);
        // The second is cut in the middle of what is looked at.
        guest.send(TX, &[&[0; HEADER], &packet[..20], &packet[20..]], &[]);
        assert_eq!(peer.receive().1, packet);
        guest.collect(TX);
        guest.collect(TX);
        assert_eq!((traffic.tx.dropped(), traffic.tx.frames()), (1, 1));
    });
}

#[test]
fn frames_beyond_a_limit_wait_and_none_is_lost() {
    in_namespace("frames_beyond_a_limit_wait_and_none_is_lost", || {
        let limits = ",rx-frames=50,rx-frames-burst=1,tx-frames=50,tx-frames-burst=1";
        let (mut guest, traffic) = card(limits);
        let peer = Peer::new();
        for _ in 0..4 {
            guest.add(RX, &[], &[1526]);
        }
        let began = Instant::now();
        for seed in 0..4 {
            transmit(&mut guest, &frame(PEER, GUEST, seed, 100));
        }
        for seed in 0..4 {
            assert_eq!(peer.receive().1, frame(PEER, GUEST, seed, 100));
        }
        assert!(began.elapsed() >= Duration::from_millis(59), "{:?}", began.elapsed());
        let began = Instant::now();
        guest.kick(RX);
        for seed in 0..4 {
            peer.send([0; HEADER], &frame(GUEST, PEER, seed, 100));
        }
        for seed in 0..4 {
            assert_eq!(guest.collect(RX).data[HEADER..], frame(GUEST, PEER, seed, 100));
        }
        assert!(began.elapsed() >= Duration::from_millis(59), "{:?}", began.elapsed());
        assert_eq!((traffic.rx.dropped(), traffic.tx.dropped()), (0, 0));
    });
}

#[test]
fn a_reset_forgets_what_came_for_the_last_driver_and_buffers_taken_ahead() {
    in_namespace("a_reset_forgets_what_came_for_the_last_driver_and_buffers_taken_ahead", || {
        let (mut guest, traffic) = card("");
        let peer = Peer::new();
        for _ in 0..200 {
            guest.add(RX, &[], &[1526]);
        }
        guest.kick(RX);
        peer.send([0; HEADER], &frame(GUEST, PEER, 1, 100));
        guest.collect(RX);
        guest.reset();
        peer.send([0; HEADER], &frame(GUEST, PEER, 2, 100));
        guest.boot(feature::MRG_RXBUF);
        guest.send(RX, &[], &[1526]);
        peer.send([0; HEADER], &frame(GUEST, PEER, 3, 100));
        assert_eq!(guest.collect(RX).data[HEADER..], frame(GUEST, PEER, 3, 100));
        assert_eq!(traffic.rx.frames(), 2);
    });
}

#[test]
fn more_frames_than_a_ring_and_a_burst_hold_all_come() {
    in_namespace("more_frames_than_a_ring_and_a_burst_hold_all_come", || {
        let (mut guest, _) = card("");
        let peer = Peer::new();
        for round in 0..5u8 {
            for _ in 0..256 {
                guest.add(RX, &[], &[256]);
            }
            guest.kick(RX);
            for seed in 0..200 {
                peer.send([0; HEADER], &frame(GUEST, PEER, seed ^ round, 100));
            }
            for seed in 0..200 {
                assert_eq!(guest.collect(RX).data[HEADER..], frame(GUEST, PEER, seed ^ round, 100));
            }
            for seed in 0..256u16 {
                guest.add(
                    TX,
                    &[&[[0; HEADER].as_slice(), &frame(PEER, GUEST, seed.to_le_bytes()[0], 90)].concat()],
                    &[],
                );
            }
            guest.kick(TX);
            for seed in 0..256u16 {
                assert_eq!(peer.receive().1, frame(PEER, GUEST, seed.to_le_bytes()[0], 90));
                guest.collect(TX);
            }
            guest.boot(u64::MAX);
        }
    });
}

#[test]
fn the_driver_says_how_many_pairs_it_uses() {
    in_namespace("the_driver_says_how_many_pairs_it_uses", || {
        let (mut guest, _) = card(",queues=2");
        let peer = Peer::new();
        let control = 4;
        let set = |guest: &mut Guest, class: u8, pairs: u16| {
            let [low, high] = pairs.to_le_bytes();
            guest.send(control, &[&[class, 0, low, high]], &[1]);
            guest.collect(control).data
        };
        for (class, pairs, answer) in [(4, 0, 1), (4, 3, 1), (1, 1, 1), (4, 2, 0)] {
            assert_eq!(set(&mut guest, class, pairs), [answer], "{class} {pairs}");
        }
        // A frame comes back on the pair on which its flow was last sent.
        for (pair, seed) in [(1, 1), (0, 2), (1, 3)] {
            guest.send(2 * pair, &[], &[1526]);
            let (_, mut packet) = large(200);
            packet[..12].copy_from_slice(&[PEER, GUEST].concat());
            packet[60] = seed;
            guest.send(2 * pair + 1, &[&[0; HEADER], &packet], &[]);
            assert_eq!(peer.receive().1, packet);
        }
        assert_eq!(set(&mut guest, 4, 1), [0]);
        guest.send(RX, &[], &[1526]);
        peer.send([0; HEADER], &frame(GUEST, PEER, 9, 100));
        assert_eq!(guest.collect(RX).data[HEADER..], frame(GUEST, PEER, 9, 100));
        // A driver without MQ has its control queue after the first pair.
        guest.boot(!feature::MQ);
        guest.send(2, &[&[4, 0, 1, 0]], &[1]);
        assert_eq!(guest.collect(2).data, [0]);
    });
}

#[test]
fn a_saved_card_has_its_address_and_its_pairs_in_another_machine() {
    in_namespace("a_saved_card_has_its_address_and_its_pairs_in_another_machine", || {
        let (mut guest, _) = card(",queues=2");
        guest.send(4, &[&[4, 0, 2, 0]], &[1]);
        assert_eq!(guest.collect(4).data, [0]);
        guest.send(RX, &[], &[1526]);
        let saved = guest.save().unwrap();
        drop(guest);
        let spec = spec("tap0,bridge=br0,vhost=off,queues=2,mac=02:00:00:00:00:99");
        let mut guest = testing::mmio(Net::open(&spec, None, None).unwrap());
        guest.load(&saved).unwrap();
        let mut mac = [0; 6];
        guest.registers.read_config(0, &mut mac);
        assert_eq!(mac, GUEST);
        let peer = Peer::new();
        // A frame comes back on the pair on which its flow was last sent. The room on the first pair is from before.
        guest.send(2, &[], &[1526]);
        for (pair, seed) in [(1, 1), (0, 2)] {
            guest.send(2 * pair + 1, &[&[0; HEADER], &frame(PEER, GUEST, seed, 200)], &[]);
            assert_eq!(peer.receive().1, frame(PEER, GUEST, seed, 200));
            guest.collect(2 * pair + 1);
            peer.send([0; HEADER], &frame(GUEST, PEER, seed, 100));
            assert_eq!(guest.collect(2 * pair).data[HEADER..], frame(GUEST, PEER, seed, 100));
        }
        assert!(guest.registers.load(saved.state.clone()).is_err());
        guest.reset();
        let mut state = saved.state.clone();
        *state.pointer_mut("/core/device/pairs").unwrap() = 3.into();
        let refusal = format!("{:#}", guest.registers.load(state).unwrap_err());
        assert!(refusal.contains("3 pairs"), "{refusal}");
    });
}

#[test]
fn a_tap_that_goes_takes_the_link_down_and_not_the_device() {
    in_namespace("a_tap_that_goes_takes_the_link_down_and_not_the_device", || {
        let (mut guest, traffic) = card("");
        guest.send(RX, &[], &[1526]);
        ip("link del tap0");
        guest.wait(None, "take the link down", |guest| {
            let mut status = [0; 2];
            guest.registers.device.core().read_config(6, &mut status);
            (status == [0; 2]).then_some(())
        });
        transmit(&mut guest, &frame(PEER, GUEST, 1, 100));
        guest.collect(TX);
        assert_eq!(traffic.tx.dropped(), 1);
    });
}

#[test]
fn a_tap_that_cannot_be_had_is_refused_with_its_cure() {
    in_namespace("a_tap_that_cannot_be_had_is_refused_with_its_cure", || {
        let _taken = Tap::open("taken", &spec("taken")).unwrap();
        ip("tuntap add several mode tap multi_queue");
        for (text, cure) in [
            ("taken", "is taken"),
            ("lo", "is no tap"),
            ("several", "name another"),
            ("tap0,bridge=none", "ip link add none type bridge"),
            ("tap1,bridge=lo", "is no bridge"),
            ("fd=2", "standard streams"),
            ("fd=999", "no descriptor 999"),
        ] {
            let fault = refusal(text);
            assert!(fault.contains(cure), "{text}: {fault}");
        }
        let no_tap = File::open("/dev/null").unwrap();
        assert!(refusal(&format!("fd={}", no_tap.as_raw_fd())).contains("IFF_VNET_HDR"));
        ip("tuntap add small mode tap");
        ip("link set small mtu 1000");
        assert!(refusal("small,mtu=1400").contains("ip link set small mtu 1400"));
    });
}

#[test]
fn a_tap_that_we_may_not_make_is_refused_with_its_cure() {
    const TEST: &str = "a_tap_that_we_may_not_make_is_refused_with_its_cure";
    if std::env::var(STAGE).is_ok_and(|stage| stage == "rights") {
        let fault = refusal("tap0");
        assert!(fault.contains("ip tuntap add tap0 mode tap user"), "{fault}");
        let fault = refusal("there,bridge=br0");
        assert!(fault.contains("ip link set there master br0"), "{fault}");
        return;
    }
    in_namespace(TEST, || {
        ip("tuntap add there mode tap");
        assert!(!alone(&path_of(TEST), "rights", &["setpriv", "--bounding-set=-all", "--inh-caps=-all"]));
    });
}

#[test]
fn an_inherited_descriptor_is_a_tap_like_any_other() {
    in_namespace("an_inherited_descriptor_is_a_tap_like_any_other", || {
        let tap = Tap::open("tap0", &spec("tap0,bridge=br0")).unwrap();
        let peer = Peer::new();
        let mut guest = testing::mmio(open(&format!("fd={},vhost=off", tap.queues[0].as_raw_fd())));
        drop(tap);
        guest.boot(u64::MAX);
        transmit(&mut guest, &frame(PEER, GUEST, 1, 100));
        assert_eq!(peer.receive().1, frame(PEER, GUEST, 1, 100));
    });
}
