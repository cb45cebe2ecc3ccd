//! Persistent memory over the driver's side of virtio, and the files that are refused. What a guest sees of the memory
//! itself is seen only by a real one.

use super::*;
use std::fs;
use std::path::Path;
use virtio::features::{EVENT_IDX, INDIRECT_DESC};
use virtio::testing::{self, Driver, MmioRegisters, Registers as _};

const ADDRESS: u64 = 5 << 30;

fn device(path: &Path) -> Pmem {
    let spec = PmemSpec { path: path.into(), ..PmemSpec::default() };
    Pmem::new(Arc::new(open(&spec).unwrap()), ADDRESS)
}

fn boot(path: &Path) -> Driver<MmioRegisters<Pmem>> {
    let mut guest = testing::mmio(device(path));
    guest.boot(EVENT_IDX | INDIRECT_DESC);
    guest
}

fn file(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

#[test]
fn the_configuration_says_where_the_memory_is() {
    let file = file(6 << 20);
    let mut config = [0; 16];
    boot(file.path()).registers.read_config(0, &mut config);
    assert_eq!(config, [ADDRESS.to_le_bytes(), (6u64 << 20).to_le_bytes()].concat()[..]);
}

#[test]
fn a_flush_succeeds_until_the_file_becomes_shorter() {
    let file = file(4 << 20);
    let mut guest = boot(file.path());
    for _ in 0..3 {
        guest.add(0, &[&FLUSH.to_le_bytes()], &[4]);
    }
    guest.kick(0);
    for _ in 0..3 {
        assert_eq!(guest.collect(0).data, DONE.to_le_bytes());
    }
    file.as_file().set_len(1 << 20).unwrap();
    guest.send(0, &[&FLUSH.to_le_bytes()], &[4]);
    assert_eq!(guest.collect(0).data, FAILED.to_le_bytes());
}

#[test]
fn an_unknown_request_fails_and_half_a_request_is_a_fault() {
    let file = file(2 << 20);
    let mut guest = boot(file.path());
    guest.send(0, &[&7u32.to_le_bytes()], &[4]);
    assert_eq!(guest.collect(0).data, FAILED.to_le_bytes());
    for (readable, room) in [(&[0u8; 3][..], 4), (&[0; 4], 3)] {
        guest.send(0, &[readable], &[room]);
        guest.wait_for_needs_reset();
        guest.boot(0);
        guest.send(0, &[&FLUSH.to_le_bytes()], &[4]);
        assert_eq!(guest.collect(0).data, DONE.to_le_bytes());
    }
}

#[test]
fn files_that_cannot_be_had_are_refused_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, size: u64| {
        let path = folder.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path.display().to_string()
    };
    let (odd, empty) = (make("odd", (2 << 20) + 1), make("empty", 0));
    let there = folder.path().display().to_string();
    let made = format!("{there}/made,size=4M");
    for (text, cure) in [
        (odd.clone(), "truncate -s %2M"),
        (empty, "truncate -s 1G"),
        (there.clone(), "name a file in it"),
        (format!("{there}/nothing"), "say size="),
        (format!("{there}/none/x,size=2M"), "make its folder"),
        (format!("{there}/x,size=3M"), "multiple of 2M"),
        (format!("{there}/x,size=2M,readonly"), "drop it, or readonly"),
        ("/dev/null".into(), "no regular file"),
    ] {
        let error = format!("{:#}", open(&kv::from_str(&text).unwrap()).unwrap_err());
        assert!(error.contains(cure), "{text}: {error}");
    }
    // What can only be read need not fill its memory.
    assert_eq!(open(&kv::from_str(&format!("{odd},readonly")).unwrap()).unwrap().length(), 4 << 20);
    let spec = kv::from_str(&made).unwrap();
    assert_eq!(open(&spec).unwrap().length(), 4 << 20);
    assert_eq!(fs::metadata(&spec.path).unwrap().len(), 4 << 20);
    let writer = open(&spec).unwrap();
    for other in [&spec, &PmemSpec { readonly: true, size: None, ..spec.clone() }] {
        let error = open(other).unwrap_err().to_string();
        assert!(error.contains("locked"), "{error}");
    }
    drop(writer);
    let readers = [(); 2].map(|()| open(&PmemSpec { readonly: true, size: None, ..spec.clone() }).unwrap());
    assert!(readers.iter().all(FileRegion::is_readonly));
}
