//! The command with contenders that misbehave: small scripts that say they are a container runtime.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// What a contender says that is well.
const WELL: &str = "printf '\\002'; echo 'bench: cpu-float 100'; echo 'bench: done 1'";

/// A folder with the command alone: no vmm is beside it.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(env!("CARGO_BIN_EXE_vmm-bench"), folder.path().join("vmm-bench")).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A container runtime that does this in place of running a container.
    fn runtime(&self, name: &str, script: &str) -> String {
        let path = self.path(name);
        let text = format!("#!/bin/sh\ncase $1 in --version) echo crun version fake; exit;; esac\n{script}\n");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("vmm-bench"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn result(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path("vmm-bench-out/result.json")).unwrap()).unwrap()
    }
}

fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", text(output));
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

const OUT: [&str; 2] = ["-o", "vmm-bench-out"];

#[test]
fn one_that_crashes_and_one_that_hangs_are_reported_and_the_rest_goes_on() {
    let place = Place::new();
    let all = [
        place.runtime("crashes", "echo no rights for containers >&2; exit 1"),
        place.runtime("hangs", "exec sleep 1000"),
        place.runtime("nonsense", "printf '\\002'; echo 'bench: cpu-float many'"),
        place.runtime("well", WELL),
    ]
    .join(",");
    let output =
        place.run(&[&["--only", "cpu", "--rounds", "2", "--time-limit", "10", "--with", &all][..], &OUT].concat());
    assert_code(&output, 0);
    let result = place.result();
    let faults = result["faults"].as_array().unwrap();
    for (contender, what) in [("crun", "no rights"), ("crun#2", "still there after 10 s"), ("crun#3", "said nonsense")]
    {
        let own: Vec<_> = faults.iter().filter(|fault| fault["contender"] == contender).collect();
        // Who never was well is not tried for ever.
        assert_eq!(own.len(), 2, "{faults:?}");
        assert!(own[0]["what"].as_str().unwrap().contains(what), "{own:?}");
    }
    for contender in ["process", "crun#4"] {
        let is_it = |figure: &&Value| figure["contender"] == contender && figure["measure"] == "cpu-float";
        let figure = result["figures"].as_array().unwrap().iter().find(is_it).unwrap();
        assert_eq!(figure["samples"].as_array().unwrap().len(), 2);
    }
    assert_eq!(result["partial"], Value::Null);
}

#[test]
fn what_is_not_here_is_named_and_skipped_with_the_line_that_installs_it() {
    let place = Place::new();
    let arguments = [&["--only", "cpu", "--rounds", "1"][..], &OUT].concat();
    let output = place.command(&arguments).env("PATH", "/nowhere").env("HOME", "/nowhere").output().unwrap();
    assert_code(&output, 0);
    let skipped = place.result()["skipped"].to_string();
    assert!(skipped.contains("neither beside vmm-bench nor in PATH"), "{skipped}");
    assert!(skipped.contains("apt install crun") && skipped.contains("apt install qemu-system-x86"), "{skipped}");
    let output = place.run(&[&["--only", "cpu", "--rounds", "1", "--with", "/bin/ls"][..], &OUT].concat());
    assert!(text(&output).contains("none of crun, runc"), "{}", text(&output));
}

#[test]
fn after_ctrl_c_what_was_measured_is_there_and_marked_as_a_part() {
    let place = Place::new();
    let log = place.path("log");
    let runtime = place.runtime("counts", &format!("echo >>{}; {WELL}", log.display()));
    let arguments = ["--only", "cpu", "--rounds", "1000", "--with", &runtime];
    let child = place.command(&[&arguments[..], &OUT].concat()).spawn().unwrap();
    let start = Instant::now();
    // Three of the fourth kind: the warm-up, and two rounds of which one is over.
    while fs::read(&log).map_or(0, |lines| lines.len()) < 3 {
        assert!(start.elapsed() < Duration::from_secs(120), "it measures nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_code(&output, 130);
    let result = place.result();
    assert_eq!(result["partial"], "interrupted");
    assert!(!result["figures"].as_array().unwrap().is_empty());
    assert!(text(&output).contains("A PART ONLY: interrupted"), "{}", text(&output));
    assert!(fs::read_to_string(place.path("vmm-bench-out/report.html")).unwrap().contains("A PART ONLY"));
}

#[test]
fn a_folder_without_room_is_named_with_the_cure() {
    let place = Place::new();
    fs::create_dir(place.path("full")).unwrap();
    // A file system of its own, of two pages; a file takes one of them.
    let script = "mount -t tmpfs -o size=8k none full && : >full/a && exec \"$@\"";
    let in_full = |variable: &str, arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]);
        command.arg(place.path("vmm-bench")).args(["--only", "cpu", "--rounds", "1"]).args(arguments);
        command.current_dir(place.folder.path()).env(variable, place.path("full"));
        command.output().expect("there is unshare (Debian 12: apt install util-linux)")
    };
    let output = in_full("TMPDIR", &OUT);
    assert_code(&output, 1);
    assert!(text(&output).contains("set TMPDIR to a folder with more room"), "{}", text(&output));
    // There is room for what is written first, and none for the result.
    let output = in_full("ELSEWHERE", &["-o", "full"]);
    assert_code(&output, 1);
    assert!(text(&output).contains("say -o with a folder that has room"), "{}", text(&output));
}

#[test]
fn a_damaged_result_and_one_of_another_version_are_wrong_usage() {
    let place = Place::new();
    let (good, bad) = (place.path("good.json"), place.path("bad.json"));
    assert_code(&place.run(&[&["--only", "cpu", "--rounds", "8", "--with", "process"][..], &OUT].concat()), 0);
    fs::rename(place.path("vmm-bench-out/result.json"), &good).unwrap();
    let compare = |one: &Path, other: &Path| place.run(&["compare", one.to_str().unwrap(), other.to_str().unwrap()]);
    let whole = fs::read_to_string(&good).unwrap();
    for damaged in [&whole[..whole.len() / 2], &whole.replace("\"version\": 1,", "\"version\": 2,"), "", "{}"] {
        fs::write(&bad, damaged).unwrap();
        let output = compare(&good, &bad);
        assert_code(&output, 2);
        assert!(text(&output).contains("name a result.json"), "{}", text(&output));
    }
    assert_code(&compare(&good, Path::new("/nowhere")), 2);
    let output = compare(&good, &good);
    assert_code(&output, 0);
    assert!(text(&output).contains("0 changed beyond the noise"), "{}", text(&output));
}

#[test]
fn a_slowdown_of_a_tenth_is_found_between_two_results() {
    let place = Place::new();
    let counts = place.path("count");
    // Values that vary a little, as measured ones do.
    let script = format!(
        "n=$(cat {0} 2>/dev/null || echo 0); echo $((n + 1)) >{0}; printf '\\002'; \
         echo bench: cpu-float $((1000 + n % 5)); echo bench: done 1",
        counts.display()
    );
    let runtime = place.runtime("varies", &script);
    let arguments = ["--only", "cpu", "--rounds", "10", "--with", &runtime];
    assert_code(&place.run(&[&arguments[..], &OUT].concat()), 0);
    let (before, after) = (place.path("before.json"), place.path("after.json"));
    let mut result = place.result();
    // Not this machine's noise is tested here.
    result["noise"] = 0.01.into();
    fs::write(&before, result.to_string()).unwrap();
    let is_it = |figure: &&mut Value| figure["contender"] == "crun" && figure["measure"] == "cpu-float";
    let figure = result["figures"].as_array_mut().unwrap().iter_mut().find(is_it).unwrap();
    for sample in figure["samples"].as_array_mut().unwrap() {
        sample["value"] = (sample["value"].as_f64().unwrap() / 1.1).into();
    }
    fs::write(&after, result.to_string()).unwrap();
    let output = place.run(&["compare", before.to_str().unwrap(), after.to_str().unwrap()]);
    assert_code(&output, 0);
    let text = text(&output);
    assert!(text.contains("1 changed beyond the noise") && text.contains("dearer"), "{text}");
}

#[test]
fn a_condition_that_holds_has_an_exit_code_of_its_own() {
    let place = Place::new();
    let runtime = place.runtime("slow", "printf '\\002'; echo 'bench: cpu-float 0.001'; echo 'bench: done 1'");
    let with = |condition: &str| {
        let arguments = ["--only", "cpu", "--rounds", "8", "--with", &runtime, "--fail-if", condition];
        place.run(&[&arguments[..], &OUT].concat())
    };
    let output = with("crun.cpu-float.ratio>1.1");
    assert_code(&output, 3);
    assert!(text(&output).contains("fail-if crun.cpu-float.ratio>1.1: holds"), "{}", text(&output));
    assert_code(&with("crun.cpu-float.ratio<1.1"), 0);
    // What is not measured does not pass.
    let output = with("vmm.cpu-float.ratio>1.1");
    assert_code(&output, 2);
    assert!(text(&output).contains("vmm is not measured here"), "{}", text(&output));
    assert_code(&with("crun.start.ratio>1.1"), 2);
    // The script says nothing of this.
    let output = with("crun.cpu-integer.ratio>1.1");
    assert_code(&output, 1);
    assert!(text(&output).contains("cpu-integer of crun was not measured"), "{}", text(&output));
    assert_code(&with("cpu-float"), 2);
}

#[test]
fn the_same_contender_twice_shows_no_difference() {
    let place = Place::new();
    let output = place.run(&[&["--only", "cpu", "--rounds", "10", "--with", "process"][..], &OUT].concat());
    assert_code(&output, 0);
    let result = place.result();
    let ratios = result["figures"].as_array().unwrap().iter().filter(|figure| figure["contender"] == "process#2");
    let ratios: Vec<&Value> = ratios.map(|figure| &figure["ratio"]).collect();
    assert_eq!(ratios.len(), 4);
    let differs = |ratio: &&&Value| ratio["low"].as_f64().unwrap() > 1.0 || ratio["high"].as_f64().unwrap() < 1.0;
    // Of a hundred comparisons one is expected to be wrong: one of four may be, two are next to never.
    let wrong = ratios.iter().filter(differs).count();
    assert!(wrong <= 1, "{ratios:?}");
}
