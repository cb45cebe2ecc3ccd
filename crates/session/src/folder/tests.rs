//! Folders, in one that is the test's own.

use super::*;

#[test]
fn the_last_lines_of_a_guest_do_nothing_to_a_terminal() {
    let all: String = (0..30).map(|number| format!("line {number}\r\n\n")).collect();
    let shown = last_lines(format!("{all}\x1b[2Jend\r\n").as_bytes());
    assert_eq!(shown.lines().count(), LAST_LINES);
    assert!(shown.starts_with("  | line 11\n") && shown.ends_with("  |  [2Jend\n"), "{shown}");
}

#[test]
fn a_name_leads_nowhere_else() {
    for name in ["a", "web-1", "A.b_c", &"x".repeat(LONGEST_NAME)] {
        check_name(name).unwrap();
    }
    for name in ["", ".", "..", "-x", "a/b", "a b", "a\nb", "lock", "ä", &"x".repeat(LONGEST_NAME + 1)] {
        check_name(name).unwrap_err();
    }
}

#[test]
fn a_machine_without_a_name_is_called_by_what_runs_there() {
    let name = |words: &[&str]| Record::name_for(&words.iter().map(ToString::to_string).collect::<Vec<_>>());
    let number = std::process::id();
    assert_eq!(name(&["/usr/bin/make", "test"]), format!("make-{number}"));
    for strange in [&[][..], &["../.."], &["ä/ö"]] {
        assert_eq!(name(strange), format!("run-{number}"));
        check_name(&name(strange)).unwrap();
    }
}

#[test]
fn what_is_no_record_is_an_error_and_never_a_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    assert!(Machine::read(&path).unwrap().is_none());
    fs::create_dir(&path).unwrap();
    assert!(Machine::read(&path).unwrap().is_none());
    fs::write(path.join("machine.json"), "{").unwrap();
    assert!(Machine::read(&path).err().unwrap().to_string().contains("damaged"));
}

#[test]
fn a_machine_is_running_then_dead_or_ended_by_what_its_lock_and_its_end_say() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("vsock"), "").unwrap();
    write(&path.join("machine.json"), &Record::now("m".into(), vec!["true".into()], "host".into(), vec![])).unwrap();
    let state = || Machine::read(&path).unwrap().unwrap().state;
    let lock = open_lock(&path).unwrap();
    lock.lock().unwrap();
    assert_eq!((state(), path.join("vsock").exists()), (State::Running, true));
    drop(lock);
    // What only a living one needs goes when the dead one is seen.
    assert_eq!((state(), path.join("vsock").exists()), (State::Dead, false));
    let end = End { code: 3, trouble: None, when: 7 };
    write(&path.join("end.json"), &end).unwrap();
    assert_eq!(state(), State::Ended(end));
}
