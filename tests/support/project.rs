//! A folder in which commands run in machines of their own.

use std::fs;
use std::rc::Rc;

use tempfile::TempDir;

use super::asset;
use super::process::{Ended, Vmm};

/// What is the command's own business is told by its exit code; everything else by this one.
pub(crate) const OURS: i32 = 125;

/// A folder to run in, and one for the files of a run.
pub(crate) struct Project {
    pub(crate) folder: Rc<TempDir>,
}

impl Project {
    pub(crate) fn new() -> Self {
        let folder = Rc::new(tempfile::tempdir().expect("there is room for files"));
        for name in ["here", "runtime"] {
            fs::create_dir(folder.path().join(name)).expect("there is room for files");
        }
        Self { folder }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).into_os_string().into_string().expect("a path of text")
    }

    /// `vmm run` with the small kernel in the project's folder; `script` is what a shell there does with it as `"$@"`.
    pub(crate) fn vmm(&self, script: &str, arguments: &[&str]) -> Vmm {
        let kernel = asset("small-vmlinux").into_os_string().into_string().expect("a path of text");
        let words = [&["run", "--kernel", &kernel], arguments].concat();
        let script = format!("cd {} && {script}", self.path("here"));
        let runtime = format!("XDG_RUNTIME_DIR={}", self.path("runtime"));
        Vmm::new(words).with(&self.folder).by(&["env", &runtime, "sh", "-c", &script, "sh"])
    }

    /// Another command about the project's machines.
    pub(crate) fn about(&self, arguments: &[&str]) -> Vmm {
        let runtime = format!("XDG_RUNTIME_DIR={}", self.path("runtime"));
        Vmm::new(arguments).with(&self.folder).by(&["env", "--chdir", &self.path("here"), &runtime])
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.vmm("exec \"$@\"", arguments).run()
    }

    /// Nothing of a run is left.
    pub(crate) fn assert_clean(&self) {
        // What is refused at once has not even made the folder of all machines.
        let left = fs::read_dir(self.path("runtime/vmm")).into_iter().flatten();
        let left: Vec<_> = left.map(|entry| entry.expect("it is there").file_name()).collect();
        assert!(left.iter().all(|name| name == "lock"), "{left:?}");
    }
}

/// Asserts on the code and on one line of ours on standard error.
pub(crate) fn assert_said(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), ""), "{ended:?}");
    let line = ended.stderr.strip_prefix("vmm run: ").unwrap_or_else(|| panic!("{ended:?}"));
    assert!(line.trim_end().lines().count() == 1 && words.iter().all(|word| line.contains(word)), "{ended:?}");
}
