//! Copies from folder to folder, and senders that lie.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::{TempDir, tempdir};

use super::*;
use crate::frame::{Kind as FrameKind, MOST_PAYLOAD, write_frame, write_message};
use crate::request::Answer;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Sends `source` and receives it at `destination`.
fn copy(source: &Path, destination: &Path) -> std::io::Result<u64> {
    let mut wire = Vec::new();
    let skipped = send(source, &mut wire)?;
    receive(destination, &mut wire.as_slice(), Limits::NONE)?;
    Ok(skipped)
}

/// What a sender that lies puts on the wire.
#[derive(Default)]
struct Wire(Vec<u8>);

impl Wire {
    fn frame(mut self, kind: FrameKind, payload: &[u8]) -> Self {
        write_frame(&mut self.0, kind, payload).unwrap();
        self
    }

    fn entry(self, path: &str, kind: Kind) -> Self {
        let entry = Entry { path: path.into(), kind, mode: 0o644 };
        self.frame(FrameKind::Entry, &entry.encode())
    }

    fn folder(self, path: &str) -> Self {
        self.entry(path, Kind::Folder)
    }

    fn link(self, path: &str, target: impl Into<PathBuf>) -> Self {
        self.entry(path, Kind::Link(target.into()))
    }

    fn file(self, path: &str, bytes: &[u8]) -> Self {
        let file = self.entry(path, Kind::File);
        file.frame(FrameKind::Data, bytes).frame(FrameKind::Data, &[])
    }

    fn end(self) -> Self {
        self.frame(FrameKind::End, &[])
    }

    /// Into a folder `in` beside which there is another, `out`, with a file in it; which must stay as it is.
    fn receive(&self, limits: Limits) -> (TempDir, std::io::Result<()>) {
        let folder = tempdir().unwrap();
        for name in ["in", "out"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        fs::write(folder.path().join("out/file"), "precious").unwrap();
        let result = receive(&folder.path().join("in"), &mut self.0.as_slice(), limits);
        assert_eq!(fs::read_to_string(folder.path().join("out/file")).unwrap(), "precious");
        assert_eq!(fs::read_dir(folder.path().join("out")).unwrap().count(), 1);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        (folder, result)
    }

    fn assert_refused(&self, part: &str) {
        let error = self.receive(Limits::NONE).1.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn a_tree_arrives_with_its_files_links_and_modes() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    let tree = from.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::create_dir(tree.join("closed")).unwrap();
    let long: Vec<u8> = (0..3 * MOST_PAYLOAD + 1).map(|n| u8::try_from(n % 251).unwrap()).collect();
    fs::write(tree.join("a/b/long"), &long).unwrap();
    fs::write(tree.join("a/empty"), "").unwrap();
    fs::write(tree.join("closed/file"), "in it").unwrap();
    symlink("../nowhere", tree.join("a/link")).unwrap();
    let odd: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"\xff\n odd");
    fs::write(tree.join(odd), "odd").unwrap();
    set_mode(&tree.join("a/b/long"), 0o751);
    set_mode(&tree.join("a/empty"), 0o4400);
    set_mode(&tree.join("closed"), 0o555);
    let _listener = UnixListener::bind(tree.join("socket")).unwrap();

    assert_eq!(copy(&tree, to.path()).unwrap(), 1, "the socket is left out");
    let tree = to.path().join("tree");
    assert!(fs::read(tree.join("a/b/long")).unwrap() == long);
    assert_eq!(fs::read(tree.join("a/empty")).unwrap(), b"");
    assert_eq!(fs::read(tree.join("closed/file")).unwrap(), b"in it");
    assert_eq!(fs::read(tree.join(odd)).unwrap(), b"odd");
    assert_eq!(fs::read_link(tree.join("a/link")).unwrap(), Path::new("../nowhere"));
    let modes = ["a/b/long", "a/empty", "closed", "a"].map(|name| mode(&tree.join(name)));
    assert_eq!(modes, [0o751, 0o400, 0o555, mode(&from.path().join("tree/a"))]);
    assert!(!tree.join("socket").exists());
    set_mode(&tree.join("closed"), 0o755);
    set_mode(&from.path().join("tree/closed"), 0o755);
}

#[test]
fn a_destination_that_is_no_folder_is_the_new_name() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("a")).unwrap();
    fs::write(at("a/x"), "1").unwrap();
    copy(&at("a"), &at("b")).unwrap();
    copy(&at("a/x"), &at("b/y")).unwrap();
    assert_eq!(fs::read_to_string(at("b/x")).unwrap() + &fs::read_to_string(at("b/y")).unwrap(), "11");
    let error = copy(&at("a/x"), &at("no/such/folder")).unwrap_err();
    assert!(error.to_string().contains("no/such"), "{error}");
}

#[test]
fn files_are_replaced_and_folders_are_filled() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("from/d")).unwrap();
    fs::create_dir_all(at("to/d")).unwrap();
    fs::write(at("from/d/x"), "new").unwrap();
    fs::write(at("elsewhere"), "old").unwrap();
    symlink(at("elsewhere"), at("to/d/x")).unwrap();
    fs::write(at("to/d/y"), "kept").unwrap();
    copy(&at("from/d"), &at("to")).unwrap();
    assert_eq!(fs::read_to_string(at("to/d/x")).unwrap(), "new");
    assert_eq!(fs::read_to_string(at("to/d/y")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(at("elsewhere")).unwrap(), "old", "the link is replaced, not what it leads to");
}

#[test]
fn a_link_that_is_named_is_followed_and_one_that_leads_nowhere_is_an_error() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    fs::write(from.path().join("real"), "text").unwrap();
    symlink("real", from.path().join("link")).unwrap();
    symlink("gone", from.path().join("lost")).unwrap();
    copy(&from.path().join("link"), to.path()).unwrap();
    assert_eq!(fs::read_to_string(to.path().join("link")).unwrap(), "text");
    assert!(to.path().join("link").symlink_metadata().unwrap().is_file());
    let error = copy(&from.path().join("lost"), to.path()).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("lost"), "{error}");
}

#[test]
fn what_has_no_bytes_to_copy_is_refused_by_name() {
    let mut wire = Vec::new();
    let error = send(Path::new("/dev/null"), &mut wire).unwrap_err();
    assert!(wire.is_empty() && error.to_string().contains("/dev/null"), "{error}");
    assert!(send(Path::new("/"), &mut wire).is_err());
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    for path in ["/abs", "..", "../out/file", ".", "", "a/../../out/file", "a//b", "a/.", "a/"] {
        let entry = Entry { path: path.into(), kind: Kind::Folder, mode: 0 };
        assert_eq!(Entry::decode(&entry.encode()).unwrap_err().kind(), ErrorKind::InvalidData, "{path}");
        Wire::default().file(path, b"x").end().assert_refused("refused");
        Wire::default().folder("a").file(path, b"x").end().assert_refused("refused");
    }
    Wire::default().file("a/b", b"x").end().assert_refused("begin");
    Wire::default().folder("a").file("b", b"x").end().assert_refused("beside");
    Wire::default().folder("a").file("ab/c", b"x").end().assert_refused("beside");
    Wire::default().folder("a").file(&format!("a/{}", "x".repeat(4096)), b"x").end().assert_refused("refused");
}

#[test]
fn no_entry_goes_through_a_link_that_came_before() {
    for target in ["../../out", "../out", "/"] {
        Wire::default().folder("a").link("a/l", target).file("a/l/file", b"x").end().assert_refused("link");
        Wire::default().folder("a").link("a/l", target).folder("a/l/file").end().assert_refused("link");
        Wire::default().folder("a").link("a/l", target).link("a/l/file", "x").end().assert_refused("link");
        Wire::default().link("a", target).file("a/file", b"x").end().assert_refused("link");
    }
    // It is not written through either, but replaced.
    let (folder, result) =
        Wire::default().folder("a").link("a/l", "../../out/file").file("a/l", b"x").end().receive(Limits::NONE);
    result.unwrap();
    assert_eq!(fs::read(folder.path().join("in/a/l")).unwrap(), b"x");
    // And no folder takes its place.
    let wire = Wire::default().folder("a").link("a/l", "../../out").folder("a/l").file("a/l/file", b"x").end();
    assert!(wire.receive(Limits::NONE).1.is_err());
}

#[test]
fn a_copy_ends_at_its_limits() {
    let wire = Wire::default().folder("a").file("a/x", &[0; 1000]).file("a/y", &[0; 1000]).end();
    wire.receive(Limits { entries: 3, bytes: 2000 }).1.unwrap();
    for limits in [Limits { entries: 2, bytes: 2000 }, Limits { entries: 3, bytes: 1999 }] {
        let error = wire.receive(limits).1.unwrap_err();
        assert!(error.to_string().contains("limit"), "{error}");
    }
}

#[test]
fn an_end_too_early_and_a_sender_that_gives_up_are_errors() {
    let whole = Wire::default().folder("a").file("a/x", b"abc").end().0;
    for length in 0..whole.len() {
        let cut = Wire(whole[..length].to_vec());
        assert_eq!(cut.receive(Limits::NONE).1.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
    let mut failed = Wire::default().folder("a");
    write_message(&mut failed.0, &Answer::Failed { message: "the disk is on fire".into() }).unwrap();
    assert_eq!(failed.receive(Limits::NONE).1.unwrap_err().to_string(), "the disk is on fire");
    Wire::default().folder("a").frame(FrameKind::Data, b"x").assert_refused("not due");
    Wire::default().entry("a", Kind::File).end().assert_refused("not due");
}

proptest! {
    #[test]
    fn an_entry_is_read_as_it_was_written(
        names in prop::collection::vec("[^/\0]{1,8}", 1..4),
        target in prop::option::of("[^\0]{1,9}"),
        mode in 0u32..0o1000,
    ) {
        prop_assume!(names.iter().all(|name| name != "." && name != ".."));
        let kind = target.map_or(Kind::File, |target| Kind::Link(target.into()));
        let entry = Entry { path: names.join("/").into(), kind, mode };
        prop_assert_eq!(Entry::decode(&entry.encode()).unwrap(), entry);
    }

    #[test]
    fn any_entry_is_good_or_refused(payload: Vec<u8>) {
        if let Ok(entry) = Entry::decode(&payload) {
            prop_assert!(entry.path.components().all(|part| matches!(part, std::path::Component::Normal(_))));
        }
    }
}
