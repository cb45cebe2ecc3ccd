//! `vmm bench`, with a machine, a container and a plain process.

mod support;

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::asset;
use support::process::Vmm;

/// What the quick suite measures of everybody.
const MEASURES: [&str; 22] = [
    "start",
    "start-exit",
    "memory-outside",
    "memory-whole",
    "cpu-integer",
    "cpu-float",
    "cpu-sha256",
    "cpu-compress",
    "ram-read",
    "ram-write",
    "ram-copy",
    "ram-latency",
    "ram-latency-huge",
    "ram-fault",
    "ram-fault-huge",
    "system-call",
    "system-pipe",
    "system-spawn",
    "disk-read",
    "disk-read-32",
    "disk-write-32",
    "disk-sync",
];

#[test]
#[ignore = "long: measures for some minutes"]
fn the_quick_suite_measures_a_process_a_container_and_a_machine_in_ten_minutes() {
    let folder = tempfile::tempdir().expect("there is room for files");
    let start = Instant::now();
    let bench = Vmm::new(["bench", "--suite", "quick", "--with", "crun"]).arg("--kernel").arg(asset("small-bzImage"));
    let mut bench = bench.arg("-o").arg(folder.path()).spawn();
    bench.close_input();
    assert!(bench.ends_within(Duration::from_secs(600)), "it takes more than ten minutes");
    let ended = bench.wait();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    eprintln!("The quick suite took {} s.", start.elapsed().as_secs());
    if std::env::var_os("VMM_EMULATED_HOST").is_some() {
        assert!(ended.stdout.starts_with("EMULATED: "), "{}", ended.stdout);
    }

    let text = fs::read_to_string(folder.path().join("result.json")).expect("it was written");
    let result: Value = serde_json::from_str(&text).expect("it is JSON");
    assert_eq!((&result["partial"], &result["faults"]), (&Value::Null, &Value::Array(Vec::new())), "{}", ended.stdout);
    let figures = result["figures"].as_array().expect("it is a list");
    for contender in ["process", "crun", "vmm"] {
        for measure in MEASURES {
            let is_it = |figure: &&Value| figure["contender"] == contender && figure["measure"] == measure;
            let figure = figures.iter().find(is_it);
            let figure = figure.unwrap_or_else(|| panic!("no {measure} of {contender}: {}", ended.stdout));
            let samples = figure["samples"].as_array().expect("it is a list");
            assert_eq!(samples.len() as u64, result["rounds"].as_u64().expect("it is a number"), "{figure}");
        }
    }
    let ratio = |figure: &Value| figure["ratio"]["low"].as_f64().unwrap_or(0.0);
    let start = figures.iter().find(|figure| figure["contender"] == "vmm" && figure["measure"] == "start");
    assert!(start.is_some_and(|start| ratio(start) > 1.0), "a machine starts slower than a process: {start:?}");

    let phases = result["phases"].as_array().expect("it is a list");
    assert_eq!(phases.len(), 3);
    for one in phases {
        let time = |name: &str| one[name].as_f64().unwrap_or(0.0);
        let sum: f64 = ["process", "kvm", "kernel", "user"].iter().map(|name| time(name)).sum();
        assert!((sum - time("whole")).abs() <= 0.02 * time("whole"), "the phases do not add up: {one}");
        let has_machine = one["contender"] == "vmm";
        assert_eq!(time("kvm") > 0.0 && time("kernel") > 0.0, has_machine, "{one}");
    }
    let page = fs::read_to_string(folder.path().join("report.html")).expect("it was written");
    assert!(page.contains("<h1>vmm bench</h1>") && page.contains("crun"));
    let lines = fs::read_to_string(folder.path().join("result.csv")).expect("it was written");
    assert!(lines.lines().count() > 3 * MEASURES.len(), "{lines}");
}
