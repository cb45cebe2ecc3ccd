//! `vmm run` on container images and disks, with the small kernel.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use support::process::{Ended, Vmm};
use support::{asset, vmm};
use tempfile::TempDir;

/// What is not the command's own business.
const OURS: i32 = 125;
/// Busybox' programs that the images have.
const APPLETS: [&str; 8] = ["cat", "echo", "id", "ls", "pwd", "sh", "stat", "touch"];

/// A folder with the root of an image in the making, and a cache.
struct Project {
    folder: Rc<TempDir>,
}

impl Project {
    fn new() -> Self {
        let project = Self { folder: Rc::new(tempfile::tempdir().expect("there is room for files")) };
        let lower = project.path("lower");
        for name in ["bin", "etc", "srv"] {
            fs::create_dir_all(lower.join(name)).expect("there is room for files");
        }
        let shell = asset("initramfs-shell");
        project.run_in("lower", &format!("cpio --quiet -id bin/busybox < {}", shell.display()));
        for applet in APPLETS {
            symlink("busybox", lower.join("bin").join(applet)).expect("there is room for files");
        }
        fs::write(lower.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:44::/srv:/bin/sh\n")
            .expect("there is room");
        fs::write(lower.join("etc/group"), "root:x:0:\nweb:x:44:\n").expect("there is room for files");
        fs::write(lower.join("etc/gone"), "gone\n").expect("there is room for files");
        fs::write(lower.join("srv/data"), "data\n").expect("there is room for files");
        chown(lower.join("srv/data"), Some(33), Some(44)).expect("tests that boot run as root");
        fs::set_permissions(lower.join("srv/data"), Permissions::from_mode(0o4640)).expect("it is ours");
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().expect("a path of text")
    }

    fn run_in(&self, folder: &str, script: &str) -> Vec<u8> {
        let output = Command::new("sh").args(["-ec", script]).current_dir(self.path(folder)).output();
        let output = output.expect("there is a shell");
        assert!(output.status.success(), "{script}: {output:?}");
        output.stdout
    }

    /// Keeps a blob, and describes it.
    fn blob(&self, bytes: &[u8]) -> Value {
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let folder = self.path("image/blobs/sha256");
        fs::create_dir_all(&folder).expect("there is room for files");
        fs::write(folder.join(&digest), bytes).expect("there is room for files");
        json!({ "digest": format!("sha256:{digest}"), "size": bytes.len() })
    }

    /// Makes a layout of an image, and says what it is called. Its layers are packed.
    fn image(&self, layers: &[Vec<u8>], config: &Value) -> String {
        let contents: Vec<Value> = layers.iter().map(|layer| self.blob(layer)["digest"].clone()).collect();
        let pack = |layer: &Vec<u8>| {
            fs::write(self.path("layer"), layer).expect("there is room for files");
            self.blob(&self.run_in("", "gzip -nc layer"))
        };
        let packed: Vec<Value> = layers.iter().map(pack).collect();
        let config =
            json!({ "os": "linux", "architecture": "amd64", "config": config, "rootfs": { "diff_ids": contents } });
        let config = self.blob(config.to_string().as_bytes());
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": packed });
        let index = json!({ "schemaVersion": 2, "manifests": [self.blob(manifest.to_string().as_bytes())] });
        fs::write(self.path("image/index.json"), index.to_string()).expect("there is room for files");
        format!("oci:{}", self.text("image"))
    }

    /// The lower layer, and one that takes a file away and brings another.
    fn layers(&self) -> Vec<Vec<u8>> {
        let upper = self.path("upper/etc");
        fs::create_dir_all(&upper).expect("there is room for files");
        fs::write(upper.join(".wh.gone"), "").expect("there is room for files");
        fs::write(upper.join("new"), "new\n").expect("there is room for files");
        ["lower", "upper"].map(|layer| self.run_in(layer, "tar --numeric-owner -cf - .")).to_vec()
    }

    /// `vmm` with these arguments, in a shell's `script`, which has it as `"$@"`.
    fn vmm(&self, script: &str, arguments: &[&str]) -> Ended {
        let cache = format!("XDG_CACHE_HOME={}", self.text("cache"));
        Vmm::new(arguments).by(&["env", &cache, "sh", "-c", script, "sh"]).with(&self.folder).run()
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        let kernel = asset("small-vmlinux").into_os_string().into_string().expect("a path of text");
        self.vmm("exec \"$@\"", &[&["run", "--kernel", &kernel, "--network", "none"], arguments].concat())
    }
}

/// Asserts on one line of ours on standard error.
fn assert_said(ended: &Ended, words: &[&str]) {
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(OURS), ""), "{ended:?}");
    let line = ended.stderr.strip_prefix("vmm run: ").unwrap_or_else(|| panic!("{ended:?}"));
    assert!(line.trim_end().lines().count() == 1 && words.iter().all(|word| line.contains(word)), "{ended:?}");
}

#[test]
#[ignore = "long: needs vmm-oci, which takes minutes to build"]
fn an_image_runs_as_it_says_or_as_it_is_told() {
    let project = Project::new();
    let script = "id -u; id -g; pwd; echo $GREETING $OTHER; stat -c '%u %g %a' /srv/data; ls /etc; \
                  cat /srv/data; touch /tmp/here && echo written";
    let config = json!({
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": [script], "Env": ["PATH=/bin", "GREETING=hello", "OTHER=image"],
        "User": "web", "WorkingDir": "/work",
    });
    let image = project.image(&project.layers(), &config);
    let ended = project.run(&["--image", &image]);
    // Two of the files are the agent's.
    let etc = "group\nhostname\nhosts\nnew\npasswd\n";
    let expected = format!("33\n44\n/work\nhello image\n33 44 4640\n{etc}data\nwritten\n");
    assert_eq!((ended.code, ended.stdout, ended.stderr), (Some(0), expected, String::new()));

    let script = "id -u; pwd; echo $GREETING $OTHER; touch /etc/mine; exit 7";
    let ended = project.run(&["--image", &image, "-e", "OTHER=ours", "-u", "root", "-w", "/srv", "--", script]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(7), "0\n/srv\nhello ours\n"), "{ended:?}");

    let data = project.path("volume");
    fs::create_dir(&data).expect("there is room for files");
    fs::write(data.join("file"), "shared\n").expect("there is room for files");
    let volume = format!("{}:/data", data.display());
    let words =
        ["--image", &image, "--entrypoint", "cat", "--volume", &volume, "--", "/etc/new", "/data/file", "/etc/mine"];
    let ended = project.run(&words);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), "new\nshared\n"), "the layer was thrown away: {ended:?}");

    let listed = project.vmm("exec \"$@\"", &["image", "ls"]);
    assert!(listed.stdout.contains(&image) && listed.stdout.contains("MiB"), "{listed:?}");
    let removed = project.vmm("exec \"$@\"", &["image", "rm", &image]);
    assert_eq!(removed.code, Some(0), "{removed:?}");
    assert!(!project.vmm("exec \"$@\"", &["image", "ls"]).stdout.contains(&image));
}

#[test]
#[ignore = "long: needs vmm-oci, which takes minutes to build"]
fn an_image_that_cannot_be_had_is_one_line_with_the_cure() {
    let project = Project::new();
    assert_said(&project.run(&["--image", "debian"]), &["debian", "HOST/debian"]);
    assert_said(&project.run(&["--image", "oci:/nonexistent"]), &["/nonexistent", "check the path"]);
    assert_said(&project.run(&["--image", "a", "--rootfs", "b"]), &["--image", "--rootfs"]);
    assert_said(&project.run(&["--disk", "a", "--image", "b"]), &["--image", "--disk"]);
    assert_said(&project.run(&["--entrypoint", "sh", "--", "true"]), &["--image"]);
    assert_said(&project.run(&["--disk", "/nonexistent", "--", "true"]), &["/nonexistent", "check its path"]);
    assert_said(&project.run(&["--disk", "/etc/passwd", "--", "true"]), &["/etc/passwd", "no file system"]);

    let empty = project.image(&project.layers(), &json!({}));
    assert_said(&project.run(&["--image", &empty]), &["-- COMMAND"]);
    let escaping = project.run_in("lower", "tar -cPf - ../upper/etc/new");
    let escaping = project.image(&[escaping], &json!({}));
    assert_said(&project.run(&["--image", &escaping, "--", "true"]), &["layer 1 of 1", "../upper/etc/new", ".."]);
    for blob in fs::read_dir(project.path("image/blobs/sha256")).expect("it is there") {
        let blob = blob.expect("it is there").path();
        let mut bytes = fs::read(&blob).expect("it is there");
        if bytes.starts_with(&[0x1f, 0x8b]) {
            *bytes.last_mut().expect("it is not empty") ^= 1;
            fs::write(&blob, bytes).expect("there is room for files");
        }
    }
    assert_said(&project.run(&["--image", &escaping, "--", "true"]), &["layer 1 of 1", "its digest is"]);

    // Without the program that deals with images.
    let alone = project.path("vmm");
    fs::copy(vmm(), &alone).expect("there is room for files");
    let output = Command::new(&alone).args(["run", "--image", "a", "--", "true"]).env("PATH", "/nonexistent").output();
    let said = String::from_utf8(output.expect("it runs").stderr).expect("it is text");
    assert!(said.contains("vmm-oci") && said.contains("cargo install"), "{said}");
}

#[test]
#[ignore = "long: needs vmm-oci, which takes minutes to build"]
fn a_full_disk_is_said_and_nothing_half_made_is_left() {
    let project = Project::new();
    let image = project.image(&project.layers(), &json!({ "Cmd": ["true"] }));
    let cache = project.text("cache");
    fs::create_dir(&cache).expect("there is room for files");
    // Too small for what is in the layers, and too small for what is made of it.
    for size in ["1m", "2600k"] {
        let script = format!(
            "mount -t tmpfs -o size={size} tmpfs {cache} || exit 99; \"$@\"; code=$?; ls -A {cache}/vmm/images; exit $code"
        );
        let kernel = asset("small-vmlinux").into_os_string().into_string().expect("a path of text");
        let ended = Vmm::new(["run", "--kernel", &kernel, "--image", &image, "--network", "none"])
            .by(&["env", &format!("XDG_CACHE_HOME={cache}"), "unshare", "-m", "sh", "-c", &script, "sh"])
            .with(&project.folder)
            .run();
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(OURS), "lock\n"), "{size}: {ended:?}");
        let said = ended.stderr.trim_end();
        assert!(said.lines().count() == 1 && said.contains(&cache) && said.contains("has no room"), "{size}: {said}");
    }
}

#[test]
#[ignore = "long: needs vmm-oci, which takes minutes to build"]
fn a_disk_is_the_root_and_keeps_what_is_written_unless_it_is_read_only() {
    let project = Project::new();
    fs::copy(asset("small-vmlinux"), project.path("lower/large")).expect("there is room for files");
    let disk = project.text("disk.img");
    project.run_in("", "mke2fs -q -t ext4 -d lower disk.img 128M");
    let run = |disk: &str, script: &str| project.run(&["--disk", disk, "-e", "PATH=/bin", "--", "sh", "-c", script]);
    let ended =
        run(&disk, "stat -c '%u %g %a' /srv/data; cat /etc/gone; cat /large > /copy; echo kept > /kept; exit 3");
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), "33 44 4640\ngone\n"), "{ended:?}");
    // One that was not unmounted could not be mounted without writing to it.
    let ended = run(&format!("{disk},readonly"), "cat /kept; echo thrown away > /kept; cat /kept");
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "kept\nthrown away\n"), "{ended:?}");
    let kept = |file: &str| project.run_in("", &format!("debugfs -R 'cat {file}' disk.img 2>/dev/null"));
    assert_eq!(kept("/kept"), b"kept\n");
    assert!(kept("/copy") == fs::read(Path::new(&project.path("lower/large"))).expect("it is there"));
    project.run_in("", "e2fsck -fn disk.img");
}
