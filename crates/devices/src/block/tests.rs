//! The whole device, from the driver's side, over every engine.
#![allow(unsafe_code, reason = "a descriptor is exchanged under a device, as a disk that fills up and empties again")]

mod medium;

use super::*;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use virtio::features::{EVENT_IDX, INDIRECT_DESC};
use virtio::testing::{self, Driver, MmioRegisters};
use vm_memory::{Bytes, GuestAddress};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const ENGINES: [EngineSpec; 3] = [EngineSpec::Inline, EngineSpec::IoUring, EngineSpec::Threads];
const SIZE: u64 = 4 << 20;

type Guest = Driver<MmioRegisters<Block>>;

/// A folder on the disk that the build is on, where `O_DIRECT` is possible.
fn folder() -> TempDir {
    let build = std::env::current_exe().unwrap();
    TempDir::new_in(build.parent().unwrap()).unwrap()
}

fn raw_image(folder: &TempDir, size: u64) -> PathBuf {
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn spec(path: PathBuf) -> BlockSpec {
    BlockSpec { path, ..BlockSpec::default() }
}

fn boot(spec: &BlockSpec) -> Guest {
    start(Block::open(spec).unwrap())
}

fn start(block: Block) -> Guest {
    let mut guest = testing::mmio(block);
    guest.boot(u64::MAX);
    guest
}

fn refusal(spec: &BlockSpec) -> String {
    format!("{:#}", Block::open(spec).err().expect("it is refused"))
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

/// Sends a request with data to the device and returns its status.
fn put(guest: &mut Guest, kind: u32, sector: u64, data: &[u8]) -> u8 {
    guest.send(0, &[&header(kind, sector), data], &[1]);
    *guest.collect(0).data.last().unwrap()
}

fn flush(guest: &mut Guest) -> u8 {
    guest.send(0, &[&header(FLUSH, 0)], &[1]);
    guest.collect(0).data[0]
}

/// Sends a request with room for data and returns that and its status.
fn get(guest: &mut Guest, kind: u32, sector: u64, length: usize) -> (Vec<u8>, u8) {
    guest.send(0, &[&header(kind, sector)], &[length, 1]);
    let mut data = guest.collect(0).data;
    let status = data.pop().unwrap();
    (data, status)
}

/// Bytes that differ from place to place.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn what_is_written_reads_back_and_is_in_the_file_by_every_engine() {
    for engine in ENGINES {
        for direct in [false, true] {
            let folder = folder();
            let path = raw_image(&folder, SIZE);
            let mut guest =
                boot(&BlockSpec { engine, direct, block_size: direct.then_some(4096), ..spec(path.clone()) });
            let data = pattern(16 << 10, 7);
            assert_eq!(put(&mut guest, OUT, 8, &data), 0, "{engine:?}");
            assert_eq!(flush(&mut guest), 0);
            assert_eq!(get(&mut guest, IN, 8, data.len()), (data.clone(), 0), "{engine:?}");
            assert_eq!(fs::read(&path).unwrap()[4096..][..data.len()], data);
        }
    }
}

#[test]
fn memory_that_does_not_suit_direct_access_is_read_and_written_all_the_same() {
    for engine in ENGINES {
        let folder = folder();
        let path = raw_image(&folder, SIZE);
        let mut guest = boot(&BlockSpec { engine, direct: true, block_size: Some(4096), ..spec(path) });
        let data = pattern(12 << 10, 9);
        let together = [&header(OUT, 16)[..], &data].concat();
        guest.send(0, &[&together], &[1]);
        assert_eq!(guest.collect(0).data, [0]);
        guest.send(0, &[&header(IN, 16)], &[100, data.len() - 100, 1]);
        assert_eq!(guest.collect(0).data, [&data[..], &[0]].concat());
    }
}

#[test]
fn many_requests_at_once_each_get_their_own_data() {
    for engine in ENGINES {
        let folder = folder();
        let mut guest = boot(&BlockSpec { engine, ..spec(raw_image(&folder, SIZE)) });
        for round in 0..8 {
            for at in 0..64u64 {
                guest.add(0, &[&header(OUT, at * 8), &pattern(4096, at + 100 * round)], &[1]);
            }
            guest.kick(0);
            for _ in 0..64 {
                assert_eq!(guest.collect(0).data, [0]);
            }
            let heads: Vec<u16> = (0..64u64).map(|at| guest.add(0, &[&header(IN, at * 8)], &[4096, 1])).collect();
            guest.kick(0);
            for _ in 0..64 {
                let used = guest.collect(0);
                let at = heads.iter().position(|head| *head == used.head).unwrap() as u64;
                assert_eq!(used.data, [&pattern(4096, at + 100 * round)[..], &[0]].concat(), "{engine:?}");
            }
        }
    }
}

#[test]
fn every_queue_is_served() {
    let folder = folder();
    let mut guest = boot(&BlockSpec { queues: Some(3), ..spec(raw_image(&folder, SIZE)) });
    for queue in 0..3 {
        let data = pattern(512, queue.into());
        guest.send(queue, &[&header(OUT, queue.into()), &data], &[1]);
        assert_eq!(guest.collect(queue).data, [0]);
        assert_eq!(get(&mut guest, IN, queue.into(), 512), (data, 0));
    }
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let folder = folder();
    let asked = BlockSpec { block_size: Some(4096), queues: Some(2), ..spec(raw_image(&folder, SIZE)) };
    let block = Block::open(&asked).unwrap();
    let config = block.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!((config.len(), word(0), word(4)), (60, 8192, 0));
    assert_eq!((word(12), word(20), config[34]), (254, 4096, 2));
    assert_eq!((word(36), word(40), word(48), word(52)), (65536, 1, 65536, 1));
    assert_eq!(block.features() & feature::MQ, feature::MQ);
    assert_eq!(block.features() & feature::RO, 0);
}

#[test]
fn the_serial_number_is_what_was_asked_for() {
    let folder = folder();
    let asked = BlockSpec { serial: Some("root-0".into()), ..spec(raw_image(&folder, SIZE)) };
    let (id, status) = get(&mut boot(&asked), GET_ID, 0, 20);
    assert_eq!((&id[..], status), (&b"root-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..], 0));
}

#[test]
fn requests_beyond_the_disk_or_of_odd_lengths_fail_and_the_next_succeeds() {
    let folder = folder();
    let mut guest = boot(&spec(raw_image(&folder, SIZE)));
    let end = SIZE / 512;
    for (sector, length) in
        [(end, 512), (end - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512), (0, 511)]
    {
        assert_eq!(get(&mut guest, IN, sector, length).1, 1, "{sector} {length}");
        assert_eq!(put(&mut guest, OUT, sector, &vec![1; length]), 1, "{sector} {length}");
    }
    assert_eq!(put(&mut guest, 77, 0, &[0; 512]), 2);
    guest.send(0, &[&[0; 15]], &[1]);
    assert_eq!(guest.collect(0).data, [1]);
    // Nothing to read, but room for the status.
    guest.send(0, &[], &[1]);
    assert_eq!(guest.collect(0).data, [1]);
    // A read of no sectors.
    guest.send(0, &[&header(IN, 0)], &[1]);
    assert_eq!(guest.collect(0).data, [0]);
    assert_eq!(get(&mut guest, IN, end - 1, 512), (vec![0; 512], 0));
}

#[test]
fn a_request_of_more_bytes_than_any_driver_asks_for_fails_and_the_next_succeeds() {
    for (kind, data) in [(IN, testing::WRITE), (OUT, 0)] {
        let folder = folder();
        let mut guest = boot(&spec(raw_image(&folder, 256 << 20)));
        let (memory, ring) = (&guest.memory, &mut guest.rings[0]);
        memory.write_slice(&header(kind, 0), GuestAddress(ring.buffer(0))).unwrap();
        let status = ring.buffer(1);
        let chain = [(ring.buffer(0), 16, 0), (ring.buffer(2), (64 << 20) + 512, data), (status, 1, testing::WRITE)];
        for (at, (address, length, flags)) in (0..).zip(chain) {
            let next = if at < 2 { testing::NEXT } else { 0 };
            let descriptor = testing::Descriptor { address, length, flags: flags | next, next: at + 1 };
            descriptor.store(memory, ring.descriptors, at);
        }
        ring.offer(memory, 0);
        guest.kick(0);
        guest.wait(Some(0), "use the chain", |guest| (guest.rings[0].used_index(&guest.memory) == 1).then_some(()));
        assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(status)).unwrap(), 1);
        guest.rings[0].next_used = 1;
        assert_eq!(get(&mut guest, IN, 0, 512).1, 0);
    }
}

#[test]
fn a_request_without_room_for_its_status_is_a_fault_and_a_reset_cures_it() {
    let folder = folder();
    let mut guest = boot(&spec(raw_image(&folder, SIZE)));
    guest.send(0, &[&header(OUT, 0), &[0; 512]], &[]);
    guest.wait_for_needs_reset();
    guest.boot(u64::MAX);
    assert_eq!(put(&mut guest, OUT, 0, &[1; 512]), 0);
}

#[test]
fn a_driver_without_event_index_and_indirect_descriptors_is_served_too() {
    let folder = folder();
    let mut guest = testing::mmio(Block::open(&spec(raw_image(&folder, SIZE))).unwrap());
    guest.boot(!(EVENT_IDX | INDIRECT_DESC));
    assert_eq!(put(&mut guest, OUT, 3, &[3; 512]), 0);
    assert_eq!(get(&mut guest, IN, 3, 512), (vec![3; 512], 0));
}

#[test]
fn a_driver_that_cannot_flush_has_its_writes_written_through() {
    for engine in ENGINES {
        let folder = folder();
        let block = Block::open(&BlockSpec { engine, ..spec(raw_image(&folder, SIZE)) }).unwrap();
        let mut guest = testing::mmio(block);
        guest.boot(!feature::FLUSH);
        assert_eq!(put(&mut guest, OUT, 3, &[3; 512]), 0);
        assert_eq!(put(&mut guest, WRITE_ZEROES, 0, &range(3, 1, 0)), 0);
        assert_eq!(get(&mut guest, IN, 3, 512), (vec![0; 512], 0));
    }
}

#[test]
fn a_read_only_disk_refuses_every_kind_of_write() {
    let folder = folder();
    let path = raw_image(&folder, SIZE);
    fs::write(&path, vec![5; 4096]).unwrap();
    let mut guest = boot(&BlockSpec { readonly: true, ..spec(path.clone()) });
    assert_eq!(guest.offered() & (feature::RO | feature::DISCARD | feature::WRITE_ZEROES), feature::RO);
    assert_eq!(put(&mut guest, OUT, 0, &[1; 512]), 1);
    assert_eq!(put(&mut guest, WRITE_ZEROES, 0, &range(0, 1, 0)), 2);
    assert_eq!(put(&mut guest, DISCARD, 0, &range(0, 1, 0)), 2);
    assert_eq!(flush(&mut guest), 0);
    assert_eq!(get(&mut guest, IN, 0, 512), (vec![5; 512], 0));
    assert_eq!(fs::read(&path).unwrap(), [5; 4096]);
}

#[test]
fn discard_and_write_zeroes_shrink_the_file_and_read_as_zeros() {
    for engine in ENGINES {
        let folder = folder();
        let path = raw_image(&folder, SIZE);
        fs::write(&path, vec![5; 4 << 20]).unwrap();
        let mut guest = boot(&BlockSpec { engine, ..spec(path.clone()) });
        let blocks = || fs::metadata(&path).unwrap().blocks();
        let full = blocks();
        assert_eq!(put(&mut guest, DISCARD, 0, &range(0, 2048, 0)), 0);
        assert_eq!(put(&mut guest, WRITE_ZEROES, 0, &range(2048, 2048, 1)), 0);
        assert!(blocks() <= full - 4096, "{engine:?}: {} of {full}", blocks());
        assert_eq!(put(&mut guest, WRITE_ZEROES, 0, &range(4096, 9, 0)), 0);
        for (sector, byte) in [(0, 0), (2048, 0), (4095, 0), (4096, 0), (4104, 0), (4105, 5)] {
            assert_eq!(get(&mut guest, IN, sector, 512), (vec![byte; 512], 0), "{engine:?} {sector}");
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
    }
}

#[test]
fn a_discard_that_is_not_possible_fails_and_changes_nothing() {
    let folder = folder();
    let path = raw_image(&folder, SIZE);
    fs::write(&path, vec![5; 4 << 20]).unwrap();
    let mut guest = boot(&spec(path.clone()));
    for (kind, range, status) in [
        (DISCARD, range(0, 1, 1), 2),
        (WRITE_ZEROES, range(0, 1, 2), 2),
        (DISCARD, range(8191, 2, 0), 1),
        (WRITE_ZEROES, range(u64::MAX, 1, 0), 1),
        (WRITE_ZEROES, range(0, u32::MAX, 0), 1),
        (DISCARD, range(0, 0, 0), 0),
    ] {
        assert_eq!(put(&mut guest, kind, 0, &range), status, "{kind} {range:?}");
    }
    assert_eq!(put(&mut guest, DISCARD, 0, &[range(0, 1, 0), range(1, 1, 0)].concat()), 1);
    assert_eq!(put(&mut guest, DISCARD, 0, &[0; 15]), 1);
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 5));
}

#[test]
fn a_range_that_the_host_cannot_zero_is_written_as_zeros() {
    // tmpfs can give ranges back, and cannot zero those that stay.
    let memory = TempDir::new_in("/dev/shm").unwrap();
    for engine in ENGINES {
        let path = raw_image(&memory, 40 << 20);
        fs::write(&path, vec![5; 40 << 20]).unwrap();
        let mut guest = boot(&BlockSpec { engine, ..spec(path.clone()) });
        assert_eq!(put(&mut guest, WRITE_ZEROES, 0, &range(8, 65536, 0)), 0);
        let now = fs::read(&path).unwrap();
        let (before, rest) = now.split_at(4096);
        let (zeros, after) = rest.split_at(32 << 20);
        assert!(zeros.iter().all(|byte| *byte == 0), "{engine:?}");
        assert!(before.iter().chain(after).all(|byte| *byte == 5), "{engine:?}");
    }
}

#[test]
fn an_image_that_becomes_shorter_gives_an_io_error_and_no_more() {
    for engine in ENGINES {
        let folder = folder();
        let path = raw_image(&folder, SIZE);
        let mut guest = boot(&BlockSpec { engine, ..spec(path.clone()) });
        OpenOptions::new().write(true).open(&path).unwrap().set_len(4096 + 512).unwrap();
        assert_eq!(get(&mut guest, IN, 8, 1024).1, 1, "{engine:?}");
        assert_eq!(get(&mut guest, IN, 8, 512).1, 0, "{engine:?}");
    }
}

/// A disk on a file that no user could name as one.
fn on(file: File, engine: EngineSpec, on_full: OnFull) -> Block {
    let raw = raw::Raw { file, size: SIZE, can_punch: true, in_memory: false, memory_alignment: None };
    let image = Arc::new(Image::Raw(raw));
    let spec = BlockSpec { engine, on_full, ..spec("odd".into()) };
    let engine = Engine::new(&spec, &image, QUEUE_SIZE.into()).unwrap();
    let features = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
    Block {
        name: "Disk odd".into(),
        queue_sizes: vec![QUEUE_SIZE],
        features,
        capacity: SIZE,
        image: image.clone(),
        medium: Some(Medium { engine, image }),
        config_change: None,
        spec,
    }
}

#[test]
fn an_io_error_of_the_host_is_one_of_the_guest() {
    for engine in ENGINES {
        // The first page of a process is never mapped, and reading it is EIO.
        let mut guest = start(on(File::open("/proc/self/mem").unwrap(), engine, OnFull::Wait));
        assert_eq!(get(&mut guest, IN, 0, 512).1, 1, "{engine:?}");
    }
}

#[test]
fn a_write_to_a_full_disk_fails_if_that_was_asked_for() {
    for engine in ENGINES {
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let mut guest = start(on(full, engine, OnFull::Error));
        assert_eq!(put(&mut guest, OUT, 0, &[1; 512]), 1, "{engine:?}");
    }
}

#[test]
fn a_write_to_a_full_disk_waits_for_room_while_reads_go_on() {
    for engine in [EngineSpec::Inline, EngineSpec::Threads] {
        let folder = folder();
        let path = raw_image(&folder, SIZE);
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let descriptor = full.as_raw_fd();
        let mut guest = start(on(full, engine, OnFull::Wait));
        let head = guest.send(0, &[&header(OUT, 0), &[1; 512]], &[1]);
        // The read is done and the write is not: it waits.
        guest.send(0, &[&header(IN, 0)], &[512, 1]);
        let read = guest.collect(0);
        assert!(read.head != head && read.data.last() == Some(&0));
        assert!(guest.try_collect(0).is_none());
        let room = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        // SAFETY: both descriptors are open, and the one that is exchanged belongs to the device.
        assert_eq!(unsafe { libc::dup2(room.as_raw_fd(), descriptor) }, descriptor);
        assert_eq!((guest.collect(0).head, fs::read(&path).unwrap()[..512] == [1; 512]), (head, true), "{engine:?}");
    }
}

#[test]
fn a_reset_ends_a_write_that_waits_for_room() {
    let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let mut guest = start(on(full, EngineSpec::Threads, OnFull::Wait));
    guest.send(0, &[&header(OUT, 0), &[1; 512]], &[1]);
    guest.send(0, &[&header(IN, 0)], &[512, 1]);
    guest.collect(0);
    guest.boot(u64::MAX);
    assert_eq!(get(&mut guest, IN, 0, 512).1, 0);
}

#[test]
fn a_reset_with_requests_in_flight_leaves_a_disk_that_works() {
    for engine in ENGINES {
        let folder = folder();
        let mut guest = boot(&BlockSpec { engine, ..spec(raw_image(&folder, SIZE)) });
        for round in 0..20u8 {
            for at in 0..64 {
                guest.add(0, &[&header(OUT, at * 8), &[round; 4096]], &[1]);
            }
            guest.kick(0);
            guest.boot(u64::MAX);
            assert_eq!(put(&mut guest, OUT, 0, &[round; 512]), 0);
            assert_eq!(get(&mut guest, IN, 0, 512), (vec![round; 512], 0), "{engine:?}");
        }
    }
}

#[test]
fn two_readers_may_share_an_image_and_nobody_else() {
    let folder = folder();
    let path = raw_image(&folder, SIZE);
    let writer = spec(path);
    let reader = BlockSpec { readonly: true, ..writer.clone() };
    let first = Block::open(&writer).unwrap();
    for other in [&writer, &reader] {
        let refusal = refusal(other);
        assert!(refusal.contains("locked") && refusal.contains("overlay=") && refusal.contains("lsof"), "{refusal}");
    }
    drop(first);
    let readers = (Block::open(&reader).unwrap(), Block::open(&reader).unwrap());
    assert!(refusal(&writer).contains("locked"));
    drop(readers);
    Block::open(&writer).unwrap();
}

#[test]
fn what_cannot_be_a_disk_is_refused_with_its_name_and_a_cure() {
    let folder = folder();
    let at = |name: &str| spec(folder.path().join(name));
    fs::write(at("empty").path, "").unwrap();
    fs::write(at("odd").path, [0; 1000]).unwrap();
    fs::write(at("sly").path, [&b"QFI\xfb"[..], &[0; 1020]].concat()).unwrap();
    std::os::unix::net::UnixListener::bind(at("socket").path).unwrap();
    for (name, cure) in [
        ("none", "truncate -s 8G"),
        (".", "a directory"),
        ("empty", "truncate -s 8G"),
        ("odd", "truncate -s %512"),
        ("sly", "format=qcow2"),
        ("socket", "neither a file nor a block device"),
    ] {
        let refusal = refusal(&at(name));
        assert!(refusal.contains(cure) && refusal.contains(folder.path().to_str().unwrap()), "{name}: {refusal}");
    }
    assert!(refusal(&spec("/dev/null".into())).contains("neither a file nor a block device"));
    Block::open(&BlockSpec { format: Some(Format::Raw), ..at("sly") }).unwrap();
}

#[test]
fn a_rate_limit_holds_on_average() {
    let folder = folder();
    let asked = BlockSpec { ops: Some(50), ops_burst: Some(1), ..spec(raw_image(&folder, SIZE)) };
    let mut guest = boot(&asked);
    let start = Instant::now();
    for at in 0..10 {
        guest.add(0, &[&header(IN, at)], &[512, 1]);
    }
    guest.kick(0);
    for _ in 0..10 {
        assert_eq!(guest.collect(0).data.last(), Some(&0));
    }
    // One passes at once, and nine more wait for a fiftieth of a second each.
    assert!(start.elapsed() >= Duration::from_millis(170), "{:?}", start.elapsed());
}

#[test]
fn a_disk_in_memory_is_served_inline_and_one_on_a_disk_is_not() {
    let name = |spec: &BlockSpec| Block::open(spec).unwrap().medium.unwrap().engine.name();
    let memory = TempDir::new_in("/dev/shm").unwrap();
    assert_eq!(name(&spec(raw_image(&memory, SIZE))), "inline");
    let folder = folder();
    let direct = BlockSpec { direct: true, block_size: Some(4096), ..spec(raw_image(&folder, SIZE)) };
    assert_ne!(name(&direct), "inline");
}
