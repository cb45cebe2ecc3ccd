//! Devices that cannot be had are refused with exit code 2 and one line that names the thing and the cure. No guest
//! runs, so any `/dev/kvm` will do. What another machine has is in `devices`.

mod support;

use std::fs;
use std::os::unix::net::UnixListener;

use support::process::Vmm;
use support::tiny::Code;

/// A machine with these devices, whose guest would end at once.
fn machine(arguments: &[&str]) -> Vmm {
    Code::default().power_off().halt().kernel(&[]).vmm(arguments)
}

#[track_caller]
fn assert_refused(arguments: &[&str], parts: &[&str]) {
    machine(arguments).run().assert_refused(parts);
}

#[test]
fn devices_and_keys_that_do_not_exist_are_refused() {
    for (flag, value, parts) in [
        ("--disk", "a.img,read-only", ["--disk", "read-only", "readonly"]),
        ("--net", "tap0,bandwidth=1M", ["--net", "bandwidth", "rx-rate"]),
        ("--rng", "rates=1M", ["--rng", "rates", "rate"]),
        ("--vsock", "path=/tmp/socket,cids=4", ["--vsock", "cids", "cid"]),
        ("--share", "/tmp,tag=data,ro", ["--share", "ro", "readonly"]),
        ("--balloon", "1M,deflate", ["--balloon", "deflate", "deflate-on-oom"]),
        ("--transport", "isa", ["--transport", "isa", "mmio"]),
    ] {
        assert_refused(&[flag, value], &parts);
    }
    assert_refused(&["--gpu", "1"], &["--gpu", "--help"]);
}

#[test]
fn a_disk_whose_image_cannot_be_had_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let (empty, odd) = (file("empty.img", b""), file("odd.img", &[0; 700]));
    // Version 3 of qcow2, and nothing after that.
    let qcow2 = file("disk.img", &[&b"QFI\xfb\0\0\0\x03"[..], &[0; 1016]].concat());
    let overlay = format!("{odd},overlay={odd}");
    for (disk, parts) in [
        ("/nonexistent/disk.img", ["/nonexistent/disk.img", "No such file", "truncate"]),
        ("/", ["/", "directory", "name"]),
        ("/dev/null", ["/dev/null", "neither a file nor a block device", "name one"]),
        (&empty, [&empty, "empty", "truncate -s"]),
        (&odd, [&odd, "700 bytes", "truncate -s"]),
        (&qcow2, [&qcow2, "is a qcow2 image", "format=qcow2"]),
        (&format!("{qcow2},format=qcow2"), [&qcow2, "header is corrupt", "copy it again"]),
        (&overlay, [&odd, "overlay is the image itself", "name another"]),
        (&format!("{odd},serial=123456789012345678901"), [&odd, "serial=", "20 bytes"]),
    ] {
        assert_refused(&["--disk", disk], &parts);
    }
}

#[test]
fn a_card_that_cannot_be_had_is_refused() {
    assert_refused(&["--net", "a-name-of-16-char"], &["a-name-of-16-char", "1 to 15"]);
    assert_refused(&["--net", "tap0,user"], &["one of", "tap=NAME"]);
    assert_refused(&["--net", "tap0,mac=03:00:00:00:00:01"], &["03:00:00:00:00:01", "even"]);
    assert_refused(&["--net", "fd=99"], &["descriptor 99", "open the tap"]);
    assert_refused(&["--net", "vhost-user=/tmp/switch,antispoof"], &["anti-spoofing", "vhost-user", "drop"]);
    assert_refused(&["--net", "vhost-user=/dev/null/switch"], &["/dev/null/switch", "name the one"]);
    // Where there are taps that we may use, an interface of another kind is none; elsewhere /dev/net/tun is missing.
    assert_refused(&["--net", "lo"], &["lo"]);
    let vmm = machine(&["--net", "user"]).by(&["env", "PATH=/nonexistent"]);
    vmm.run().assert_refused(&["passt", "PATH", "apt install passt", "tap=NAME"]);
}

#[test]
fn a_vsock_whose_socket_cannot_be_had_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
    let (file, taken) = (path("file"), path("taken"));
    fs::write(&file, "").unwrap();
    let _listener = UnixListener::bind(&taken).unwrap();
    assert_refused(&["--vsock", &file], &[&file, "no socket", "choose another path"]);
    assert_refused(&["--vsock", &taken], &[&taken, "in use", "choose another path"]);
    assert_refused(&["--vsock", "/nonexistent/socket"], &["/nonexistent/socket", "choose"]);
    assert_refused(&["--vsock", &format!("{},cid=2", path("other"))], &["cid=2", "reserved", "say 3"]);
    assert!(!fs::exists(path("other")).unwrap());
}

#[test]
fn a_folder_that_cannot_be_shared_is_refused() {
    assert_refused(&["--share", "/tmp"], &["tag=NAME"]);
    assert_refused(&["--share", &format!("/tmp,tag={}", "a".repeat(37))], &["tag=aaa", "1 to 36 bytes"]);
    assert_refused(&["--share", "/dev/null,tag=data"], &["data", "/dev/null", "no folder", "name one"]);
    assert_refused(&["--share", "/nonexistent,tag=data"], &["data", "/nonexistent", "make that folder"]);
}

#[test]
fn a_balloon_or_a_limit_of_no_possible_size_is_refused() {
    assert_refused(&["--balloon", "1000"], &["1000", "multiple of 4K"]);
    assert_refused(&["--balloon", "12Q"], &["--balloon", "12Q"]);
    assert_refused(&["--rng", "rate=0"], &["limit of 0", "rate="]);
}

#[test]
fn more_devices_than_there_are_places_are_refused() {
    for (transport, cure) in [("mmio", "transport=pci"), ("pci", "")] {
        let arguments = [&["--transport", transport][..], &["--rng"; 40]].concat();
        assert_refused(&arguments, &["places", cure]);
    }
}

#[test]
fn two_devices_of_one_name_are_refused() {
    assert_refused(&["--rng", "id=it", "--balloon", "id=it"], &["called it", "id=NAME"]);
}
