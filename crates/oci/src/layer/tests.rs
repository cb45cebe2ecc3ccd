//! Layers as tools write them, and as nobody should.

use std::io::Write as _;

use tar::Builder;

use super::*;
use crate::testing::{Item, layer_of};

fn read_bytes(bytes: &[u8]) -> anyhow::Result<Vec<Entry>> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    read(&file, bytes.len() as u64)
}

fn refusal(item: Item<'_>) -> String {
    format!("{:#}", read_bytes(&layer_of(&[item])).unwrap_err())
}

#[test]
fn all_kinds_of_files_are_read_with_their_owners_and_modes() {
    let bytes = layer_of(&[
        Item::folder("srv/").owner(7, 8).mode(0o1777),
        Item::file("srv/file", b"content").owner(70_000, 3_000_000).mode(0o4755),
        Item::link("srv/link", "./srv/file"),
        Item::symlink("srv/sym", "../../outside"),
        Item::device("srv/null", 1, 3),
        Item::of("srv/disk", EntryType::Block, b""),
        Item::of("srv/pipe", EntryType::Fifo, b""),
    ]);
    let entries = read_bytes(&bytes).unwrap();
    let kinds: Vec<&Kind> = entries.iter().map(|entry| &entry.kind).collect();
    let Kind::File { offset, length } = *kinds[1] else { panic!("it is a file") };
    let start = usize::try_from(offset).unwrap();
    assert_eq!(&bytes[start..start + usize::try_from(length).unwrap()], b"content");
    assert_eq!(kinds[0], &Kind::Folder);
    assert_eq!(kinds[2], &Kind::Link(b"srv/file".to_vec()));
    assert_eq!(kinds[3], &Kind::Symlink(b"../../outside".to_vec()), "only the guest follows it");
    assert_eq!(kinds[4..], [&Kind::Character(1, 3), &Kind::Block(0, 0), &Kind::Pipe]);
    let meta = |at: usize| (entries[at].meta.mode, entries[at].meta.uid, entries[at].meta.gid);
    assert_eq!((meta(0), meta(1)), ((0o1777, 7, 8), (0o4755, 70_000, 3_000_000)));
    assert_eq!(entries[0].path, b"srv");
}

#[test]
fn long_names_are_read_however_they_are_written() {
    let long = ["x".repeat(200), "y".repeat(200)].join("/");
    let gnu = layer_of(&[Item::file(&long, b"1"), Item::symlink(&long, &long)]);
    let mut pax = Builder::new(Vec::new());
    let records =
        [("path", long.as_bytes()), ("linkpath", long.as_bytes()), ("uid", b"2147483648"), ("mtime", b"12.5")];
    pax.append_pax_extensions(records).unwrap();
    pax.append(&Item::of("short", EntryType::Symlink, b"").header(), &b""[..]).unwrap();
    for bytes in [gnu, pax.into_inner().unwrap()] {
        let last = read_bytes(&bytes).unwrap().pop().unwrap();
        assert_eq!((last.path, last.kind), (long.clone().into_bytes(), Kind::Symlink(long.clone().into_bytes())));
    }
}

#[test]
fn attributes_stay_but_those_that_mean_something_to_the_guests_overlay() {
    let mut pax = Builder::new(Vec::new());
    let names = ["user.a", "security.capability", "trusted.b", "trusted.overlay.redirect", "system.posix_acl_access"];
    let records = names.map(|name| (format!("SCHILY.xattr.{name}"), b"v\0\n"));
    pax.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), &value[..]))).unwrap();
    pax.append(&Item::file("a", b"").header(), &b""[..]).unwrap();
    let entries = read_bytes(&pax.into_inner().unwrap()).unwrap();
    let kept: Vec<&[u8]> = entries[0].meta.xattrs.iter().map(|(name, _)| name.as_slice()).collect();
    assert_eq!(kept, [&b"user.a"[..], b"security.capability", b"trusted.b"]);
    assert_eq!(entries[0].meta.xattrs[0].1, b"v\0\n");
}

#[test]
fn an_absolute_path_begins_at_the_images_root_and_one_that_leads_upwards_is_refused() {
    let path = |name| read_bytes(&layer_of(&[Item::file(name, b"")])).unwrap().remove(0).path;
    assert_eq!(path("/etc/passwd"), b"etc/passwd");
    assert_eq!(path(".//./etc/./passwd"), b"etc/passwd");
    for name in ["..", "../x", "a/../x", "a/..", "/../etc/passwd"] {
        let error = refusal(Item::file(name, b""));
        assert!(error.contains("..") && error.contains("out of the image"), "{error}");
        let error = refusal(Item::link("a", name));
        assert!(error.contains("hard link"), "{error}");
    }
}

#[test]
fn an_entry_that_cannot_be_is_refused_with_its_name() {
    let (long, deep) = ("n".repeat(256), "d/".repeat(2100));
    for (item, words) in [
        (Item::of("odd", EntryType::new(b'Q'), b""), "not understood"),
        (Item::of("sparse", EntryType::GNUSparse, b""), "not understood"),
        (Item::file(&long, b""), "longer than 255"),
        (Item::file(&deep, b""), "longer than 4096"),
        (Item::device("big", 1 << 12, 0), "no device 4096:0"),
        (Item::symlink("empty", ""), "symbolic link to nothing"),
        (Item::file(".", b""), "root is no folder"),
        (Item::file("far", b"").owner(1 << 32, 0), "owner 4294967296"),
    ] {
        let error = refusal(item);
        assert!(error.contains("the entry ") && error.contains(words), "{error}");
    }
}

#[test]
fn a_layer_that_is_cut_off_or_damaged_is_refused_wherever() {
    let whole = layer_of(&[Item::folder("a"), Item::file("a/b", &[7; 1000]), Item::link("c", "a/b")]);
    // What fills the last block, and the two that end it, may be missing.
    for length in (1..whole.len() - 2048).filter(|length| length % 512 != 0) {
        assert!(read_bytes(&whole[..length]).is_err() || (1024 + 1000..2048 + 512).contains(&length), "{length}");
    }
    // There is more than one way to write the same sum.
    for at in (0..148).chain(156..512 + 148) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        assert!(read_bytes(&flipped).is_err(), "{at}");
    }
}

#[test]
fn a_size_is_never_believed() {
    for size in [1 << 10, 1 << 40, u64::MAX] {
        let mut header = Item::file("a", b"").header();
        header.set_size(size);
        header.set_cksum();
        let error = format!("{:#}", read_bytes(header.as_bytes()).unwrap_err());
        assert!(error.contains("cut off"), "{size}: {error}");
        for kind in [EntryType::GNULongName, EntryType::XHeader, EntryType::XGlobalHeader] {
            let mut header = Item::of("a", kind, b"").header();
            header.set_size(size);
            header.set_cksum();
            assert!(read_bytes(header.as_bytes()).is_err(), "{size}");
        }
    }
}

#[test]
fn sparse_files_and_numbers_that_are_none_are_refused() {
    for (key, value, words) in
        [("GNU.sparse.major", "1", "sparse"), ("uid", "many", "uid=many is no number"), ("size", "-1x", "no number")]
    {
        let mut pax = Builder::new(Vec::new());
        pax.append_pax_extensions([(key, value.as_bytes())]).unwrap();
        pax.append(&Item::file("a", b"").header(), &b""[..]).unwrap();
        let error = format!("{:#}", read_bytes(&pax.into_inner().unwrap()).unwrap_err());
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_pax_record_is_as_long_as_it_says_or_damaged() {
    assert_eq!(record(b"8 a=b\nc\nrest"), Some((&b"a"[..], &b"b\nc"[..], &b"rest"[..])));
    for bad in
        [&b""[..], b"7 a=b\nc\n", b"9 a=b\nc\n", b"4 a\n", b"x a=b\n", b"-6 a=b\n", b"2 a=b\n", b"0 a=b\n", b"99"]
    {
        assert_eq!(record(bad), None, "{}", bad.escape_ascii());
    }
}
