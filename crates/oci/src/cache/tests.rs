//! What is kept, for how long, and who may.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::*;

fn cache(folder: &Path, most: u64) -> Cache {
    Cache::at(folder.join("images"), most).unwrap()
}

/// Keeps an image of so many bytes, with a name, that was last used so long ago.
fn keep(cache: &Cache, name: &str, size: usize, age: Duration) -> Digest {
    let (digest, locked) = (Digest::of(name.as_bytes()), cache.lock().unwrap());
    locked.keep(digest, &Config::default(), |path| Ok(fs::write(path, vec![0; size])?)).unwrap();
    locked.note(name, digest, digest).unwrap();
    let file = File::open(cache.image(&digest.hex())).unwrap();
    file.set_times(FileTimes::new().set_modified(SystemTime::now() - age)).unwrap();
    digest
}

fn names(cache: &Cache) -> Vec<String> {
    cache.names().unwrap().into_iter().map(|named| named.reference).collect()
}

fn files(cache: &Cache) -> Vec<String> {
    let entries = fs::read_dir(cache.folder()).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn an_image_is_found_again_with_what_runs_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path(), 1000);
    let config = Config { cmd: Some(vec!["true".to_owned()]), user: Some("web".to_owned()), ..Config::default() };
    let digest = Digest::of(b"a");
    assert_eq!(cache.ready(&digest.hex()).unwrap(), None);
    cache.lock().unwrap().keep(digest, &config, |path| Ok(fs::write(path, "x")?)).unwrap();
    let ready = cache.ready(&digest.hex()).unwrap().unwrap();
    assert_eq!((fs::read(ready.path).unwrap(), ready.config), (b"x".to_vec(), config));
}

#[test]
fn those_go_first_that_were_not_used_for_longest_and_none_that_was_just_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path(), 1000);
    keep(&cache, "old", 400, 3 * HOUR);
    let used = keep(&cache, "used", 400, 4 * HOUR);
    cache.ready(&used.hex()).unwrap().unwrap();
    keep(&cache, "new", 400, HOUR);
    assert_eq!(names(&cache), ["used", "new"]);
    // Larger than the cache by itself: somebody is about to use it.
    keep(&cache, "large", 2000, Duration::ZERO);
    assert_eq!(names(&cache), ["used", "large"], "what was asked for just now stays, too");
}

#[test]
fn an_image_that_is_not_finished_is_never_there() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path(), 1000);
    let failed = cache.lock().unwrap().keep(Digest::of(b"a"), &Config::default(), |path| {
        fs::write(path, "half")?;
        bail!("no more")
    });
    assert_eq!(failed.unwrap_err().to_string(), "no more");
    assert_eq!(files(&cache), ["lock"]);
    // Whoever was killed could not clean up.
    fs::write(cache.folder().join("new-x"), "half").unwrap();
    drop(cache.lock().unwrap());
    assert_eq!(files(&cache), ["lock"]);
}

#[test]
fn images_are_forgotten_by_name_and_by_digest() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path(), 1000);
    let digest = keep(&cache, "a", 10, HOUR);
    cache.lock().unwrap().note("also-a", digest, digest).unwrap();
    keep(&cache, "b", 10, HOUR);
    let locked = cache.lock().unwrap();
    assert!(locked.forget("a").unwrap() && !locked.forget("a").unwrap());
    assert!(cache.ready(&digest.hex()).unwrap().is_some(), "it has another name");
    assert!(locked.forget(&digest.to_string()).unwrap());
    assert!(cache.ready(&digest.hex()).unwrap().is_none());
    assert_eq!(
        (names(&cache), locked.prune(false).unwrap(), locked.prune(true).unwrap()),
        (vec!["b".to_owned()], 0, 10)
    );
    assert_eq!(files(&cache), ["index.json", "lock"]);
}

#[test]
fn only_one_at_a_time_changes_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path(), 1000);
    let try_lock = || {
        let lock = File::options().write(true).open(cache.folder().join("lock")).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
    };
    let locked = cache.lock().unwrap();
    assert_eq!(try_lock(), Err(rustix::io::Errno::WOULDBLOCK));
    drop(locked);
    assert_eq!(try_lock(), Ok(()));
}

#[test]
fn a_folder_that_others_may_enter_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |path: &str| format!("{:#}", Cache::at(folder.path().join(path), 1).err().unwrap());
    fs::create_dir(folder.path().join("open")).unwrap();
    fs::set_permissions(folder.path().join("open"), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(refusal("open").contains("chmod 700"), "{}", refusal("open"));
    fs::write(folder.path().join("file"), "").unwrap();
    assert!(refusal("file").contains("XDG_CACHE_HOME"), "{}", refusal("file"));
    cache(folder.path(), 1);
    symlink("images", folder.path().join("link")).unwrap();
    assert!(refusal("link").contains("XDG_CACHE_HOME"), "{}", refusal("link"));
}

#[test]
fn a_damaged_list_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path(), 1);
    fs::write(cache.folder().join("index.json"), "[").unwrap();
    assert!(cache.names().unwrap_err().to_string().contains("index.json is damaged"));
}
