//! Tests of the image's arguments, its description and its errors.

use super::*;

fn spec(packages: &[&str]) -> ImageSpec {
    ImageSpec {
        size: Size(2 << 30),
        suite: None,
        ssh_key: None,
        hostname: "debian".to_owned(),
        packages: packages.iter().map(|package| (*package).to_owned()).collect(),
    }
}

fn refusal(spec: &ImageSpec) -> String {
    let error = format!("{:#}", spec.check().unwrap_err());
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn the_description_boots_from_what_lies_beside_it() {
    let table: toml::Table = toml().parse().unwrap();
    assert_eq!(table["kernel"].as_str(), Some("vmlinuz"));
    assert_eq!(table["initrd"].as_str(), Some("initrd.img"));
    assert!(table["cmdline"].as_str().unwrap().starts_with("root=/dev/vda"));
    assert_eq!(table["disk"][0]["path"].as_str(), Some("debian.img"));
}

#[test]
fn a_size_that_cannot_hold_debian_is_refused() {
    spec(&[]).check().unwrap();
    for size in [2, 512 << 10, (512 << 20) - 1, u64::MAX] {
        let error = refusal(&ImageSpec { size: Size(size), ..spec(&[]) });
        assert!(error.contains("--size") && error.contains("such as 2G"), "{error}");
    }
}

#[test]
fn what_is_no_package_is_refused_by_name() {
    spec(&["nginx", "g++", "libc6-dev=2.36-9+deb12u13", "0ad"]).check().unwrap();
    for package in ["Nginx", "-y", "", "./x.deb", "a,b", "a b", "?essential", "nginx=", "nginx/sid", "x"] {
        let error = refusal(&spec(&[package]));
        assert!(error.contains(&format!("{package:?}")), "{error}");
    }
}

#[test]
fn a_name_that_no_host_or_suite_can_have_is_refused() {
    for hostname in ["", "a b", "-a", "a.b", "a\nb", &"x".repeat(64)] {
        refusal(&ImageSpec { hostname: hostname.to_owned(), ..spec(&[]) });
    }
    for suite in ["", "-", "../x", "Bookworm"] {
        refusal(&ImageSpec { suite: Some(suite.to_owned()), ..spec(&[]) });
    }
}

#[test]
fn a_missing_a_private_and_a_foreign_ssh_key_are_refused_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let with_key = |name: &str, content: Option<&str>| {
        let file = folder.path().join(name);
        if let Some(content) = content {
            fs::write(&file, content).unwrap();
        }
        ImageSpec { ssh_key: Some(file), ..spec(&[]) }
    };
    assert!(refusal(&with_key("missing", None)).contains("missing"));
    let private = with_key("id", Some("-----BEGIN OPENSSH PRIVATE KEY-----\nxxx\n"));
    assert!(refusal(&private).contains("id.pub"));
    assert!(refusal(&with_key("text", Some("hello\n"))).contains("text"));
    assert!(refusal(&with_key("two", Some("ssh-rsa A\nssh-rsa B\n"))).contains("two"));
    let key = with_key("good", Some("ssh-ed25519 AAAA me\n"));
    key.check().unwrap();
    assert_eq!(read_key(&key.ssh_key.unwrap()).unwrap(), "ssh-ed25519 AAAA me\n");
}

#[test]
fn the_packages_are_the_same_however_they_are_said_and_have_one_kernel() {
    let one = spec(&["nginx", "fio"]);
    let other = spec(&["fio", "nginx", "fio", "udev"]);
    assert_eq!(one.all_packages(false), other.all_packages(false));
    assert!(one.all_packages(false).contains(&KERNEL));
    assert!(!one.all_packages(false).contains(&"openssh-server"));
    let own = spec(&["linux-image-amd64"]);
    assert!(!own.all_packages(true).contains(&KERNEL));
    assert!(own.all_packages(true).contains(&"openssh-server"));
}

#[test]
fn an_error_of_mmdebstrap_is_one_line_that_names_the_thing() {
    let fault = |said: &[&str]| {
        let said: Vec<String> = said.iter().map(|line| (*line).to_owned()).collect();
        let fault = install_fault(&said, "bookworm").to_string();
        assert!(!fault.contains('\n'), "{fault}");
        fault
    };
    let unknown =
        fault(&["I: running", "E: Unable to locate package nignx", "E: setup failed: E: apt-get --yes failed"]);
    assert!(unknown.starts_with("Debian bookworm has no package nignx:"), "{unknown}");
    let virtual_package = fault(&["Package x is virtual", "E: Package 'mail' has no installation candidate"]);
    assert!(virtual_package.contains("no package 'mail'"), "{virtual_package}");
    assert!(fault(&["tar: x: Write failed: No space left on device"]).contains("TMPDIR"));
    assert!(fault(&["E: The repository 'x' does not have a Release file."]).contains("--suite"));
    assert!(fault(&["I: fine", "dpkg: error processing package x", "E: all is lost"]).ends_with("x; E: all is lost"));
}
