//! Images of this host's, from the reference to the file system image.

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::testing::{Item, image_of, layer_of, layout_of};

/// A folder for images and one for the cache.
struct Place {
    folder: TempDir,
    cache: Cache,
}

impl Place {
    fn new(most: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("cache"), most).unwrap();
        Self { folder, cache }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).into_os_string().into_string().unwrap()
    }

    /// Makes a layout of an image with these layers.
    fn layout(&self, layers: &[Vec<u8>], config: &Value) -> String {
        let (blobs, descriptor) = image_of(layers, config);
        layout_of(&self.folder.path().join("image"), &blobs, &[descriptor]);
        self.path("image")
    }

    fn get(&self, reference: &str) -> anyhow::Result<Image> {
        get(&self.cache, reference, false, Patience::default())
    }

    fn error(&self, reference: &str) -> String {
        format!("{:#}", self.get(reference).unwrap_err())
    }

    /// What is in the cache beside its lock.
    fn files(&self) -> Vec<String> {
        let names = fs::read_dir(self.cache.folder()).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).filter(|name| name != "lock").collect()
    }
}

/// What is in a file system image: kinds and modes, owners, sizes and names.
fn listing(image: &Path) -> Vec<String> {
    let output = Command::new("unsquashfs").args(["-lln"]).arg(image).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let name = words[words.len().min(5)..].join(" ").replacen("squashfs-root", "", 1);
        // A device has two numbers with a space between them, or none.
        let device = words[0].starts_with(['c', 'b']);
        format!("{} {} {}", words[0], words[1], if device { "device".to_owned() } else { name })
    };
    String::from_utf8(output.stdout).unwrap().lines().map(line).collect()
}

fn pack(name: &str, from: &Path, to: &str) {
    let status = Command::new("tar").args(["-C"]).arg(from).args(["-cf", to, name]).status().unwrap();
    assert!(status.success());
}

fn rich() -> Vec<Vec<u8>> {
    let long = "n".repeat(200);
    let lower = layer_of(&[
        Item::folder("./").mode(0o711),
        Item::file("bin/tool", b"tool").owner(0, 50).mode(0o4755),
        Item::link("bin/same", "bin/tool"),
        Item::file("etc/gone", b"gone"),
        Item::file("/srv/data", b"data").owner(70_000, 80_000).mode(0o640),
        Item::symlink("srv/out", "../../../etc/passwd"),
        Item::device("srv/null", 1, 3).mode(0o666),
        Item::file(&long, b"long"),
    ]);
    vec![lower, layer_of(&[Item::file("etc/.wh.gone", b""), Item::file("etc/new", b"new")])]
}

#[test]
fn a_layout_becomes_one_file_system_with_owners_modes_links_and_devices() {
    let place = Place::new(1 << 30);
    let config = json!({ "Entrypoint": ["/bin/tool"], "Env": ["A=b"], "WorkingDir": "/work", "ExposedPorts": {} });
    let image = place.get(&place.layout(&rich(), &config)).unwrap();
    assert_eq!(image.config.entrypoint, Some(vec!["/bin/tool".to_owned()]));
    let expected = [
        "drwx--x--x 0/0 ".to_owned(),
        "drwxr-xr-x 0/0 /bin".to_owned(),
        "-rwsr-xr-x 0/50 /bin/same".to_owned(),
        "-rwsr-xr-x 0/50 /bin/tool".to_owned(),
        "drwxr-xr-x 0/0 /etc".to_owned(),
        "-rw-r--r-- 0/0 /etc/new".to_owned(),
        format!("-rw-r--r-- 0/0 /{}", "n".repeat(200)),
        "drwxr-xr-x 0/0 /srv".to_owned(),
        "-rw-r----- 70000/80000 /srv/data".to_owned(),
        "crw-rw-rw- 0/0 device".to_owned(),
        "lrwxrwxrwx 0/0 /srv/out -> ../../../etc/passwd".to_owned(),
        "drwxr-xr-x 0/0 /work".to_owned(),
    ];
    assert_eq!(listing(&image.path), expected);
    // No rights are needed, and no device of it is ever one of this host's.
    let all = fs::read_dir(place.cache.folder()).unwrap().map(|entry| entry.unwrap().file_type().unwrap());
    assert!(all.into_iter().all(|kind| kind.is_file() && !kind.is_char_device()));
}

#[test]
fn the_same_image_is_unpacked_once_whatever_it_comes_in() {
    let place = Place::new(1 << 30);
    let layout = place.layout(&rich(), &json!({}));
    let first = place.get(&format!("oci:{layout}")).unwrap();
    let (archive, docker) = (place.path("oci.tar"), place.path("docker.tar"));
    pack(".", Path::new(&layout), &archive);
    let (blobs, _) = image_of(&rich(), &json!({}));
    let saved = place.folder.path().join("saved");
    fs::create_dir_all(saved.join("one")).unwrap();
    for (name, blob) in ["one/layer.tar", "two.tar", "config.json"].iter().zip(&blobs) {
        fs::write(saved.join(name), blob).unwrap();
    }
    fs::create_dir(saved.join("link")).unwrap();
    std::os::unix::fs::symlink("../two.tar", saved.join("link/layer.tar")).unwrap();
    let list =
        json!([{ "Config": "config.json", "RepoTags": ["n:v1"], "Layers": ["one/layer.tar", "link/layer.tar"] }]);
    fs::write(saved.join("manifest.json"), list.to_string()).unwrap();
    pack(".", &saved, &docker);
    let before = fs::metadata(&first.path).unwrap();
    for reference in [&archive, &format!("oci-archive:{archive}"), &docker, &format!("docker-archive:{docker}:n:v1")] {
        let image = place.get(reference).unwrap();
        assert_eq!((&image.path, &image.config), (&first.path, &first.config), "{reference}");
    }
    assert_eq!(
        std::os::unix::fs::MetadataExt::ino(&before),
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(&first.path).unwrap())
    );
    assert_eq!(place.cache.names().unwrap().len(), 5);
    let error = place.error(&format!("docker-archive:{docker}:n:v2"));
    assert!(error.contains("these are: n:v1"), "{error}");
}

#[test]
fn a_layout_of_several_images_has_to_be_told_which() {
    let place = Place::new(1 << 30);
    let layout = place.path("image");
    let named = |name: &str, blobs: &mut Vec<Vec<u8>>| {
        let (more, mut descriptor) = image_of(&[layer_of(&[Item::file(name, b"")])], &json!({}));
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        blobs.extend(more);
        descriptor
    };
    let mut blobs = Vec::new();
    let mut manifests: Vec<Value> = ["v1", "v2"].iter().map(|name| named(name, &mut blobs)).collect();
    let mut arm = named("arm", &mut blobs);
    arm["platform"] = json!({ "os": "linux", "architecture": "arm64" });
    manifests.push(arm);
    layout_of(Path::new(&layout), &blobs, &manifests);
    assert!(place.error(&layout).contains("one of v1, v2"), "{}", place.error(&layout));
    assert!(listing(&place.get(&format!("oci:{layout}:v2")).unwrap().path).iter().any(|line| line.ends_with("/v2")));
    for (tag, words) in [("v3", "v1, v2, arm for linux/arm64"), ("arm", "no image arm for linux/amd64")] {
        let error = place.error(&format!("oci:{layout}:{tag}"));
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn an_image_that_is_missing_or_none_is_refused_with_its_name() {
    let place = Place::new(1 << 30);
    fs::create_dir(place.path("empty")).unwrap();
    fs::write(place.path("text"), "no archive").unwrap();
    fs::write(place.path("packed"), [0x1f, 0x8b, 8, 0, 0]).unwrap();
    for (name, words) in [
        ("missing", "there is no image at"),
        ("empty", "no index.json in it"),
        ("text", "cut off"),
        ("packed", "unpack it first"),
    ] {
        let error = place.error(&place.path(name));
        assert!(error.contains(&place.path(name)) && error.contains(words), "{error}");
    }
    let error = place.error(&format!("oci-archive:{}", place.path("empty")));
    assert!(error.contains("say oci:"), "{error}");
    let error = place.error("debian");
    assert!(error.contains("say HOST/debian"), "{error}");
    assert_eq!(place.files(), Vec::<String>::new());
}

#[test]
fn a_damaged_image_is_refused_and_nothing_is_left() {
    let place = Place::new(1 << 30);
    let good = rich();
    let layout = place.layout(&good, &json!({}));
    let blob = |digest: Digest| Path::new(&layout).join("blobs/sha256").join(digest.hex());
    let layer = blob(Digest::of(&good[0]));
    let mut flipped = good[0].clone();
    flipped[600] ^= 1;
    for (content, words) in [(&flipped[..], "its digest is"), (&good[0][..5000], "bytes where its descriptor says")] {
        fs::write(&layer, content).unwrap();
        let error = place.error(&layout);
        assert!(error.contains("layer 1 of 2") && error.contains(words), "{error}");
    }
    fs::remove_file(&layer).unwrap();
    assert!(place.error(&layout).contains("cannot open"), "{}", place.error(&layout));
    assert_eq!(place.files(), Vec::<String>::new());
    fs::write(&layer, &good[0]).unwrap();
    place.get(&layout).unwrap();
}

#[test]
fn a_layer_that_would_lead_out_of_the_image_is_refused_and_nothing_is_left() {
    let place = Place::new(1 << 30);
    for item in [Item::file("../../escaped", b"x"), Item::link("x", "../escaped"), Item::folder("a/../..")] {
        let name = item.header().path_bytes().escape_ascii().to_string();
        let error = place.error(&place.layout(&[layer_of(&[item])], &json!({})));
        assert!(error.contains("layer 1 of 1") && error.contains(&name) && error.contains(".."), "{error}");
    }
    let working = json!({ "WorkingDir": "/file/x" });
    let error = place.error(&place.layout(&[layer_of(&[Item::file("file", b"")])], &working));
    assert!(error.contains("working directory"), "{error}");
    assert_eq!(place.files(), Vec::<String>::new());
    assert!(!place.folder.path().join("escaped").exists());
}

#[test]
fn an_image_larger_than_the_cache_is_refused_before_it_fills_the_disk() {
    let place = Place::new(100_000);
    let layers = [layer_of(&[Item::file("a", &[1; 60_000])]), layer_of(&[Item::file("b", &[2; 60_000])])];
    let error = place.error(&place.layout(&layers, &json!({})));
    assert!(error.contains("layer 2 of 2") && error.contains("VMM_IMAGE_CACHE"), "{error}");
    assert_eq!(place.files(), Vec::<String>::new());
}

#[test]
fn an_image_for_another_machine_is_refused() {
    let place = Place::new(1 << 30);
    let config = json!({ "architecture": "arm64", "os": "linux", "rootfs": { "diff_ids": [] } });
    assert!(manifest::config(config.to_string().as_bytes()).unwrap_err().to_string().contains("linux, arm64"));
    let layout = place.layout(&rich(), &json!({}));
    let index = Path::new(&layout).join("index.json");
    File::create(&index).unwrap();
    assert!(place.error(&layout).contains("not understood"), "{}", place.error(&layout));
}
