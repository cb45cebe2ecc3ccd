//! qcow2 images, good ones and those that an adversary made.

use super::*;
use crate::block::Block;
use std::os::unix::fs::FileExt as _;
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;

/// Makes a qcow2 image, over `backing` with its format.
fn make(path: &Path, backing: Option<(&str, &str)>) -> PathBuf {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    let mut builder = Layer::create_builder(storage(file, path, true).unwrap()).size(SIZE);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.into(), format.into());
    }
    builder.create().unwrap();
    path.to_owned()
}

fn spec(path: PathBuf) -> BlockSpec {
    BlockSpec { path, format: Some(Format::Qcow2), ..BlockSpec::default() }
}

fn refusal(spec: &BlockSpec) -> String {
    format!("{:#}", Block::open(spec).err().expect("it is refused"))
}

fn job(op: Op, offset: u64, memory: &mut [u8]) -> Job {
    let mut job = Job::with_capacity(1);
    job.set(op, offset, memory.len() as u64);
    job.extend([libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() }]);
    job
}

fn write(image: &Qcow2, offset: u64, byte: u8, length: usize) {
    image.execute(&job(Op::Write, offset, &mut vec![byte; length])).unwrap();
}

fn read(image: &Qcow2, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut memory = vec![0xaa; length];
    image.execute(&job(Op::Read, offset, &mut memory)).map(|_| memory)
}

fn plain(image: &Qcow2, op: Op, offset: u64, length: u64) -> io::Result<u64> {
    let mut job = Job::with_capacity(0);
    job.set(op, offset, length);
    image.execute(&job)
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

/// A big-endian number in a file.
fn long(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn what_is_flushed_is_there_when_the_image_is_opened_again() {
    let folder = TempDir::new().unwrap();
    let path = make(&folder.path().join("disk"), None);
    let image = Qcow2::open(&spec(path.clone())).unwrap();
    assert_eq!((image.size(), image.is_writable()), (SIZE, true));
    write(&image, 1 << 20, 7, 100_000);
    plain(&image, Op::Flush, 0, 0).unwrap();
    // A second look at the file, as after the death of this process.
    let copy = folder.path().join("copy");
    fs::copy(&path, &copy).unwrap();
    let again = Qcow2::open(&BlockSpec { readonly: true, ..spec(copy) }).unwrap();
    assert_eq!(read(&again, 1 << 20, 100_000).unwrap(), vec![7; 100_000]);
    assert_eq!(read(&again, 0, 512).unwrap(), [0; 512]);
}

#[test]
fn a_discard_reads_as_zeros_and_a_range_of_zeros_too() {
    let folder = TempDir::new().unwrap();
    let image = Qcow2::open(&spec(make(&folder.path().join("disk"), None))).unwrap();
    write(&image, 0, 7, 1 << 20);
    plain(&image, Op::Punch, 0, 256 << 10).unwrap();
    plain(&image, Op::Zero, 256 << 10, 1000).unwrap();
    plain(&image, Op::Discard, 512 << 10, 128 << 10).unwrap();
    assert_eq!(read(&image, 0, (256 << 10) + 1000).unwrap(), vec![0; (256 << 10) + 1000]);
    assert_eq!(read(&image, (256 << 10) + 1000, 24).unwrap(), [7; 24]);
}

#[test]
fn a_backing_image_is_read_through_and_never_written() {
    let folder = TempDir::new().unwrap();
    let base = make(&folder.path().join("base"), None);
    write(&Qcow2::open(&spec(base.clone())).unwrap(), 0, 5, 65536);
    let before = fs::read(&base).unwrap();
    let image = Qcow2::open(&spec(make(&folder.path().join("top"), Some(("base", "qcow2"))))).unwrap();
    write(&image, 512, 6, 512);
    assert_eq!(read(&image, 0, 2048).unwrap(), [[5; 512], [6; 512], [5; 512], [5; 512]].concat());
    assert_eq!(fs::read(&base).unwrap(), before);
    assert!(refusal(&spec(base)).contains("locked"), "a backing image in use is locked");
}

#[test]
fn a_chain_of_backing_images_that_is_a_circle_or_too_long_is_refused() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    make(&at("self"), Some(("self", "qcow2")));
    make(&at("one"), Some(("two", "qcow2")));
    make(&at("two"), Some(("one", "qcow2")));
    for name in ["self", "one"] {
        let read_only = BlockSpec { readonly: true, ..spec(at(name)) };
        assert!(refusal(&read_only).contains("its own backing image"), "{}", refusal(&read_only));
        // Here the lock is what the circle meets first.
        refusal(&spec(at(name)));
    }
    make(&at("0"), None);
    for depth in 1..=DEEPEST {
        make(&at(&depth.to_string()), Some((&(depth - 1).to_string(), "qcow2")));
    }
    Qcow2::open(&spec(at(&(DEEPEST - 1).to_string()))).unwrap();
    assert!(refusal(&spec(at(&DEEPEST.to_string()))).contains("qemu-img commit"));
}

#[test]
fn a_backing_image_outside_of_the_folder_is_refused_unless_that_was_said() {
    let (folder, elsewhere) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let secret = elsewhere.path().join("secret");
    fs::write(&secret, vec![9; 1 << 20]).unwrap();
    std::os::unix::fs::symlink(&secret, folder.path().join("link")).unwrap();
    let name = elsewhere.path().file_name().unwrap().to_str().unwrap();
    let relative = format!("../{name}/secret");
    for (at, backing) in [("a", secret.to_str().unwrap()), ("b", &relative), ("c", "link"), ("d", "/dev/zero")] {
        let path = make(&folder.path().join(at), Some((backing, "raw")));
        assert!(refusal(&spec(path)).contains("backing-folder="), "{backing}");
    }
    let allowed = BlockSpec { backing_folder: Some(std::env::temp_dir()), ..spec(folder.path().join("a")) };
    assert_eq!(read(&Qcow2::open(&allowed).unwrap(), 0, 512).unwrap(), [9; 512]);
}

#[test]
fn a_backing_image_that_is_missing_or_of_another_format_is_refused() {
    let folder = TempDir::new().unwrap();
    let missing = make(&folder.path().join("a"), Some(("none", "raw")));
    assert!(refusal(&spec(missing)).contains("Cannot find"));
    fs::write(folder.path().join("base"), vec![0; 1 << 20]).unwrap();
    let odd = make(&folder.path().join("b"), Some(("base", "vmdk")));
    assert!(refusal(&spec(odd)).contains("only raw and qcow2"));
}

#[test]
fn what_is_not_qcow2_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    assert!(refusal(&spec(path)).contains("drop format=qcow2"));
}

#[test]
fn an_image_shorter_than_its_header_says_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = make(&folder.path().join("disk"), None);
    write(&Qcow2::open(&spec(path.clone())).unwrap(), 0, 7, 1 << 20);
    let whole = fs::read(&path).unwrap();
    for length in [3, 50, 72, 104, 65536, 131_073, long(&path, 40) + 7] {
        fs::write(&path, &whole[..usize::try_from(length).unwrap()]).unwrap();
        refusal(&spec(path.clone()));
    }
}

#[test]
fn a_corrupt_header_is_refused_before_anything_is_allocated_for_it() {
    let folder = TempDir::new().unwrap();
    for (number, (offset, bytes)) in [
        (4, vec![0, 0, 0, 9]),
        (20, vec![0, 0, 0, 63]),
        (20, vec![0, 0, 0, 8]),
        (24, vec![0x7f; 8]),
        (32, vec![0, 0, 0, 1]),
        (36, vec![0xff; 4]),
        (40, vec![0xff; 8]),
        (40, vec![0, 0, 0, 0, 0, 3, 0, 1]),
        (48, vec![0xff; 8]),
        (56, vec![0xff; 4]),
        (100, vec![0, 0, 0, 1]),
    ]
    .into_iter()
    .enumerate()
    {
        let path = make(&folder.path().join(number.to_string()), None);
        patch(&path, offset, &bytes);
        assert!(refusal(&spec(path.clone())).contains(path.to_str().unwrap()), "{offset}");
    }
}

#[test]
fn corrupt_tables_are_an_error_and_never_the_end_of_the_process() {
    let folder = TempDir::new().unwrap();
    let original = make(&folder.path().join("disk"), None);
    write(&Qcow2::open(&spec(original.clone())).unwrap(), 0, 7, 1 << 20);
    let l1 = long(&original, 40);
    let l2 = long(&original, l1) & 0x00ff_ffff_ffff_fe00;
    assert!(l2 > 0);
    for (at, entry) in
        [(l1, 1 << 40), (l1, 512), (l2, 1 << 40), (l2, 512), (l2, u64::MAX), (l2, l2), (l1, l1), (l2, 1 << 62)]
    {
        let path = folder.path().join("copy");
        fs::copy(&original, &path).unwrap();
        patch(&path, at, &entry.to_be_bytes());
        // Refused at once, or by the request; what is not an error is data, and neither of both panics.
        if let Ok(image) = Qcow2::open(&spec(path)) {
            let _ = read(&image, 0, 65536);
            let _ = image.execute(&job(Op::Write, 0, &mut [1; 4096]));
            let _ = plain(&image, Op::Discard, 0, 65536);
            let _ = plain(&image, Op::Flush, 0, 0);
        }
    }
}

#[test]
fn an_overlay_takes_the_writes_and_is_kept_or_thrown_away() {
    let folder = TempDir::new().unwrap();
    let base = folder.path().join("base");
    fs::write(&base, vec![5; 1 << 20]).unwrap();
    let overlay = folder.path().join("overlay");
    let kept = BlockSpec { path: base.clone(), overlay: Some(overlay), ..BlockSpec::default() };
    let image = Qcow2::open(&kept).unwrap();
    assert_eq!(image.size(), 1 << 20);
    write(&image, 0, 6, 512);
    drop(image);
    let image = Qcow2::open(&kept).unwrap();
    assert_eq!(read(&image, 0, 1024).unwrap(), [[6; 512], [5; 512]].concat());
    drop(image);
    assert!(refusal(&BlockSpec { keep: Some(false), ..kept.clone() }).contains("keep=off"));

    let other = folder.path().join("other");
    fs::write(&other, vec![8; 1 << 20]).unwrap();
    assert!(refusal(&BlockSpec { path: other, ..kept.clone() }).contains("no overlay over"));

    let gone = folder.path().join("gone");
    let image = Qcow2::open(&BlockSpec { overlay: Some(gone.clone()), keep: Some(false), ..kept }).unwrap();
    write(&image, 0, 6, 512);
    assert_eq!((read(&image, 0, 512).unwrap(), gone.exists()), (vec![6; 512], false));
    assert!(fs::read(&base).unwrap().iter().all(|byte| *byte == 5));
}

#[test]
fn two_vms_can_have_overlays_over_one_image() {
    let folder = TempDir::new().unwrap();
    let base = folder.path().join("base");
    fs::write(&base, vec![5; 1 << 20]).unwrap();
    let over =
        |name: &str| BlockSpec { path: base.clone(), overlay: Some(folder.path().join(name)), ..BlockSpec::default() };
    let (one, two) = (Qcow2::open(&over("one")).unwrap(), Qcow2::open(&over("two")).unwrap());
    write(&one, 0, 1, 512);
    write(&two, 0, 2, 512);
    assert_eq!((read(&one, 0, 512).unwrap(), read(&two, 0, 512).unwrap()), (vec![1; 512], vec![2; 512]));
    assert!(refusal(&over("one")).contains("locked"));
}
