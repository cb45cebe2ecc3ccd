//! The file and its predecessors.

use super::*;
use tempfile::TempDir;

fn spec(dir: &TempDir, max: u64, keep: u32) -> FileSpec {
    FileSpec { path: dir.path().join("log"), max: Size(max), keep }
}

fn write_all(file: &mut LogFile, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let written = file.write(bytes).unwrap();
        bytes = &bytes[written..];
    }
}

fn size(path: PathBuf) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.len())
}

/// What opening says.
fn refusal(spec: &FileSpec) -> String {
    format!("{:#}", LogFile::open(spec).unwrap_err())
}

#[test]
fn a_file_is_appended_to_and_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir, 4096, 1);
    write_all(&mut LogFile::open(&spec).unwrap(), b"one ");
    write_all(&mut LogFile::open(&spec).unwrap(), b"two");
    assert_eq!(fs::read(&spec.path).unwrap(), b"one two");
    assert_eq!(fs::metadata(&spec.path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn files_never_hold_more_than_was_allowed_and_keep_the_latest() {
    for keep in [0, 1, 3] {
        let dir = TempDir::new().unwrap();
        let spec = spec(&dir, 4096, keep);
        let mut file = LogFile::open(&spec).unwrap();
        let said: Vec<u8> = (0..=255).cycle().take(50_000).collect();
        for piece in said.chunks(777) {
            write_all(&mut file, piece);
            let entries = fs::read_dir(dir.path()).unwrap();
            let sizes: Vec<u64> = entries.map(|entry| entry.unwrap().metadata().unwrap().len()).collect();
            assert!(sizes.len() <= keep as usize + 1 && sizes.iter().all(|size| *size <= 4096), "{sizes:?}");
        }
        let mut kept = Vec::new();
        for number in (0..=keep).rev() {
            kept.extend(fs::read(file.numbered(number)).unwrap());
        }
        assert!(kept.len() > keep as usize * 4096);
        assert!(said.ends_with(&kept));
    }
}

#[test]
fn a_file_that_is_full_at_the_start_is_rotated_first() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir, 4096, 1);
    fs::write(&spec.path, [b'x'; 5000]).unwrap();
    let mut file = LogFile::open(&spec).unwrap();
    write_all(&mut file, b"new");
    assert_eq!(fs::read(&spec.path).unwrap(), b"new");
    assert_eq!(size(file.numbered(1)), Some(5000));
}

#[test]
fn a_rotation_that_fails_is_tried_again_and_loses_no_file() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir, 4096, 3);
    let mut file = LogFile::open(&spec).unwrap();
    for byte in [b'a', b'b', b'c'] {
        write_all(&mut file, &[byte; 4096]);
    }
    // A directory with something in it cannot be replaced by a file.
    let obstacle = file.numbered(3);
    fs::create_dir_all(obstacle.join("x")).unwrap();
    assert!(file.write(b"lost").is_err());
    assert!(file.write(b"lost").is_err());
    fs::remove_dir_all(&obstacle).unwrap();
    write_all(&mut file, b"kept");
    assert_eq!(fs::read(&spec.path).unwrap(), b"kept");
    for (number, byte) in [(1, b'c'), (2, b'b'), (3, b'a')] {
        assert_eq!(fs::read(file.numbered(number)).unwrap(), [byte; 4096]);
    }
}

#[test]
fn a_rotation_goes_on_after_the_new_file_could_not_be_made() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir, 4096, 1);
    let mut file = LogFile::open(&spec).unwrap();
    write_all(&mut file, &[b'a'; 4096]);
    let moved = dir.path().with_extension("moved");
    fs::rename(dir.path(), &moved).unwrap();
    assert!(file.write(b"lost").is_err());
    fs::rename(&moved, dir.path()).unwrap();
    write_all(&mut file, b"kept");
    assert_eq!(fs::read(&spec.path).unwrap(), b"kept");
}

#[test]
fn what_cannot_be_a_console_is_refused_with_its_name_and_a_cure() {
    let dir = TempDir::new().unwrap();
    let at = |path: &str| FileSpec { path: dir.path().join(path), max: Size(4096), keep: 1 };
    fs::create_dir(dir.path().join("folder")).unwrap();
    std::os::unix::fs::symlink("elsewhere", dir.path().join("link")).unwrap();
    std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    for (path, cure) in [
        ("folder", "it is a directory"),
        ("none/log", "does not exist"),
        ("link", "symbolic link"),
        ("socket", "not a regular file"),
    ] {
        let refusal = refusal(&at(path));
        assert!(refusal.contains(cure) && refusal.contains(path), "{refusal}");
    }
    let device = FileSpec { path: "/dev/null".into(), ..at("") };
    assert!(refusal(&device).contains("not a regular file"));
    assert!(refusal(&spec(&dir, 100, 1)).contains("max=4K"));
    assert!(refusal(&spec(&dir, 4096, 4_000_000_000)).contains("1000"));
}

#[test]
fn two_consoles_cannot_share_a_file() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir, 4096, 1);
    let mut first = LogFile::open(&spec).unwrap();
    assert!(refusal(&spec).contains("another console"));
    write_all(&mut first, &[b'a'; 5000]);
    assert!(refusal(&spec).contains("another console"), "the next file is locked like the first");
    drop(first);
    LogFile::open(&spec).unwrap();
}
