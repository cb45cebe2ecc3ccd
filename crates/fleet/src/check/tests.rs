//! What is wrong with a file, and in which words it is said.

use super::*;

/// The faults of a file, each with its line.
fn faults(text: &str) -> Vec<String> {
    let faults = check(Path::new("/srv/shop/fleet.toml"), text).err().unwrap_or_default();
    faults.iter().map(ToString::to_string).collect()
}

/// Asserts that the text has one fault, in this line and in these words.
#[track_caller]
fn assert_fault(text: &str, line: usize, words: &[&str]) {
    let faults = faults(text);
    assert_eq!(faults.len(), 1, "{faults:?}");
    let place = format!("line {line}: ");
    assert!(faults[0].starts_with(&place) && words.iter().all(|word| faults[0].contains(word)), "{faults:?}");
}

#[test]
fn a_fleet_has_its_folders_name_and_paths_count_from_there() {
    let text =
        "[services.web]\ncommand = ['true']\nvolumes = ['/usr:/data:ro', 'data:/var/lib']\nmem = '64M'\ncpus = 2\n";
    let fleet = check(Path::new("/srv/shop/fleet.toml"), text).unwrap();
    assert_eq!((fleet.name.as_str(), fleet.services["web"].replicas), ("shop", 1));
    assert_eq!(fleet.services["web"].cpus.said.as_deref(), Some("2"));
    assert_fault("[services.web]\ncommand = ['true']\nrootfs = 'root'\n", 3, &["/srv/shop/root"]);
}

#[test]
fn a_service_that_is_not_there_cannot_be_waited_for_nor_talked_to() {
    let text = "[services.db]\ncommand = ['true']\n[services.web]\ncommand = ['true']\n";
    assert_fault(&format!("{text}depends_on = {{ bd = 'started' }}\n"), 5, &["web", "`bd`", "did you mean `db`"]);
    assert_fault(&format!("{text}allow = ['dbb:80']\n"), 5, &["`dbb`", "did you mean `db`"]);
}

#[test]
fn who_waits_for_himself_is_named_with_the_way() {
    let text = "[services.a]\ncommand = ['true']\ndepends_on = { b = 'started' }\n\
                [services.b]\ncommand = ['true']\ndepends_on = { c = 'started' }\n\
                [services.c]\ncommand = ['true']\ndepends_on = { a = 'started' }\n";
    assert_fault(text, 3, &["a → b → c → a"]);
    assert_fault("[services.a]\ncommand = ['true']\ndepends_on = { a = 'started' }\n", 3, &["a → a"]);
}

#[test]
fn what_is_waited_for_must_be_possible() {
    let text = "[services.db]\ncommand = ['true']\nrestart = 'always'\n[services.web]\ncommand = ['true']\n";
    assert_fault(&format!("{text}depends_on = {{ db = 'healthy' }}\n"), 6, &["no health"]);
    assert_fault(&format!("{text}depends_on = {{ db = 'completed' }}\n"), 6, &["always"]);
    assert_fault(&format!("{text}depends_on = {{ db = 'ready' }}\n"), 6, &["depends_on", "`ready`"]);
}

#[test]
fn a_port_is_published_once() {
    let text = |a: &str, b: &str| {
        format!(
            "[services.a]\ncommand = ['true']\npublish = ['{a}']\n[services.b]\ncommand = ['true']\npublish = ['{b}']\n"
        )
    };
    assert_fault(&text("8080:80", "8080:81"), 6, &["8080", "twice"]);
    assert_fault(&text("0.0.0.0:8080:80", "8080:81"), 6, &["8080", "twice"]);
    for (a, b) in [("8080:80", "8081:80"), ("8080:80", "8080:80/udp")] {
        assert_eq!(faults(&text(a, b)), Vec::<String>::new());
    }
}

#[test]
fn two_services_have_two_names() {
    assert_fault("[services.a]\ncommand = ['true']\n[services.a]\ncommand = ['true']\n", 3, &["duplicate"]);
}

#[test]
fn an_image_that_is_missing_is_said_before_anything_starts() {
    assert_fault("[services.a]\nimage = './no-such.tar'\n", 2, &["/srv/shop/./no-such.tar"]);
    assert_fault("kernel = 'no-such'\n[services.a]\nimage = 'x/y:1'\nkernel = '/proc/version'\n", 1, &["no-such"]);
}

#[test]
fn everything_wrong_is_said_at_once_in_the_order_of_the_lines() {
    let text = "nmae = 'x'\n\
                [services.Web]\ncommand = ['true']\n\
                [services.b]\ncomand = ['true']\n\
                [services.c]\nmem = '12Q'\ncommand = ['true']\n\
                [services.d]\ncommand = ['true']\nsecrets = { 'a/b' = '/nonexistent' }\n\
                [services.e]\nimage = 'x'\nrootfs = '/usr'\n\
                [services.f]\n";
    let faults = faults(text);
    let expected = [
        (1, "did you mean `name`"),
        (2, "`Web` is no name"),
        (5, "did you mean `command`"),
        (7, "mem"),
        (11, "`a/b` is no file's name"),
        (11, "/nonexistent cannot be read"),
        (12, "one root"),
        (15, "nothing to run"),
    ];
    assert_eq!(faults.len(), expected.len(), "{faults:#?}");
    for (fault, (line, words)) in faults.iter().zip(expected) {
        assert!(fault.starts_with(&format!("line {line}: ")) && fault.contains(words), "{fault} {words}");
    }
}

#[test]
fn a_fleet_has_services_and_numbers_of_machines_that_can_be() {
    for text in ["", "services = 1\n", "[services]\n"] {
        assert_fault(text, 1, &["[services.NAME]"]);
    }
    assert_fault("[services.a]\ncommand = ['true']\nreplicas = 1000\n", 3, &["1000"]);
    assert_fault("[services.a]\ncommand = ['true']\nreplicas = -1\n", 3, &["replicas"]);
    assert_fault("[services.a]\ncommand = ['true']\ndisk = '/proc/version'\nreplicas = 2\n", 4, &["share"]);
    assert_fault("[services.a]\ncommand = ['true']\ndisks = ['data:1G']\nreplicas = 2\n", 4, &["share"]);
    let text = "[services.a]\ncommand = ['true']\ndisks = ['data:1G']\n";
    assert_fault(&format!("{text}{}", text.replace(".a", ".b")), 6, &["`data`", "a has it, too"]);
    assert_fault("[services.a]\ncommand = ['true']\ndisks = ['data']\n", 3, &["disks", "`data`", "no size"]);
    assert_fault("[services.a]\ncommand = ['true']\ndisks = ['./no.img']\n", 3, &["/srv/shop/./no.img"]);
}
