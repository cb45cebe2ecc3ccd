//! The rules at the head of the crate, one by one, and that no text whatever panics.

use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;

use crate::{Size, from_str};

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Memory {
    size: Size,
    #[serde(default)]
    hugepages: HugePages,
    #[serde(default)]
    prefault: bool,
    shared: Option<bool>,
}

#[derive(Debug, PartialEq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum HugePages {
    #[default]
    Off,
    #[serde(rename = "2M")]
    TwoMega,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Serial {
    Stdio,
    Off,
    File(Log),
    Unix { path: PathBuf },
    Fd(u8),
}

#[derive(Debug, PartialEq, Deserialize)]
struct Log {
    path: PathBuf,
    max: Option<Size>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(transparent)]
struct Mac(String);

#[derive(Debug, PartialEq, Deserialize)]
struct Everything {
    count: i16,
    #[serde(default)]
    list: Vec<u64>,
    #[serde(default)]
    words: Vec<String>,
    mac: Option<Mac>,
    limit: Option<Log>,
    serial: Option<Serial>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    pair: Option<(u8, u8)>,
}

fn fault<T: serde::de::DeserializeOwned + std::fmt::Debug>(text: &str) -> String {
    from_str::<T>(text).expect_err(text).to_string()
}

fn memory(size: u64) -> Memory {
    Memory { size: Size(size), hugepages: HugePages::Off, prefault: false, shared: None }
}

#[test]
fn the_first_bare_item_is_the_value_of_the_first_field() {
    assert_eq!(from_str("512M"), Ok(memory(512 << 20)));
    let all = Memory { hugepages: HugePages::TwoMega, prefault: true, shared: Some(false), ..memory(1 << 30) };
    assert_eq!(from_str("1G,hugepages=2M,prefault,shared=off"), Ok(all));
    assert_eq!(from_str("size=1M"), Ok(memory(1 << 20)));
    assert_eq!(from_str("prefault,size=1M"), Ok(Memory { prefault: true, ..memory(1 << 20) }));
    let path = |path: &str| Ok(Log { path: path.into(), max: None });
    assert_eq!(from_str("\"max\""), path("max"));
    assert_eq!(from_str("\"a=b,c\""), path("a=b,c"));
}

#[test]
fn every_spelling_of_a_boolean_is_understood() {
    for (word, value) in [("on", true), ("yes", true), ("true", true), ("off", false), ("no", false), ("false", false)]
    {
        assert_eq!(from_str(&format!("1M,prefault={word}")), Ok(Memory { prefault: value, ..memory(1 << 20) }));
    }
    assert_eq!(fault::<Memory>("1M,prefault=maybe"), "prefault: `maybe` is neither on nor off: say on or off");
}

#[test]
fn the_first_word_names_the_variant() {
    assert_eq!(from_str("stdio"), Ok(Serial::Stdio));
    let log = Log { path: "x.log".into(), max: Some(Size(16 << 20)) };
    assert_eq!(from_str("file,path=x.log,max=16M"), Ok(Serial::File(log)));
    assert_eq!(from_str("file,x.log"), Ok(Serial::File(Log { path: "x.log".into(), max: None })));
    assert_eq!(from_str("unix,path=/s"), Ok(Serial::Unix { path: "/s".into() }));
    assert_eq!(from_str("unix,/s"), Ok(Serial::Unix { path: "/s".into() }));
    assert_eq!(from_str("fd,3"), Ok(Serial::Fd(3)));
}

#[test]
fn what_follows_a_variant_must_fit_it() {
    assert_eq!(fault::<Serial>("off,path=x"), "`off` stands alone: drop `,path=x`");
    assert_eq!(fault::<Serial>("file"), "file: `path` is missing: say path=VALUE");
    assert_eq!(fault::<Serial>("file,max=1M"), "file: `path` is missing: say path=VALUE");
    assert!(fault::<Serial>("file,path=x,mx=1M").starts_with("file: Unknown key `mx` (did you mean `max`?)"));
    assert!(fault::<Serial>("fd,3,4").contains("`4` is too much"));
    assert!(fault::<Serial>("fd").contains("value is missing"));
    assert!(fault::<Serial>("fd,").contains("value is missing"));
    let which = "`path=x` does not say which: begin with one of `stdio`, `off`, `file`, `unix`, `fd`";
    assert_eq!(fault::<Serial>("path=x"), which);
    assert!(fault::<Serial>("fiel,path=x").starts_with("Unknown word `fiel` (did you mean `file`?)"));
    assert!(fault::<Serial>("").starts_with("A word is missing"));
}

#[test]
fn values_of_every_kind_are_read() {
    let text = "-0x10,list=[1,0x20],words=[\"a,b\",c=d,e],mac=52:54:00:00:00:01,limit=[x,max=1M],\
                serial=[file,path=[y],max=2K],labels=[a=b,c=d],pair=[1,2]";
    // A list is no path: the innermost brackets make this one a fault, and without them it reads.
    assert!(fault::<Everything>(text).starts_with("serial: file: path: `[y]` is a list"));
    let read: Everything = from_str(&text.replace("[y]", "y")).expect("a good text");
    assert_eq!((read.count, &*read.list), (-16, &[1, 32][..]));
    assert_eq!(read.words, ["a,b", "c=d", "e"]);
    assert_eq!(read.mac, Some(Mac("52:54:00:00:00:01".into())));
    assert_eq!(read.limit, Some(Log { path: "x".into(), max: Some(Size(1 << 20)) }));
    assert_eq!(read.serial, Some(Serial::File(Log { path: "y".into(), max: Some(Size(2048)) })));
    assert_eq!(read.labels.get("c").map(String::as_str), Some("d"));
    assert_eq!(read.pair, Some((1, 2)));
}

#[test]
fn one_item_alone_needs_no_brackets() {
    let read: Everything = from_str("1,list=7,limit=path=x,serial=stdio").expect("a good text");
    assert_eq!(read.list, [7]);
    assert_eq!(read.limit, Some(Log { path: "x".into(), max: None }));
    assert_eq!(read.serial, Some(Serial::Stdio));
    assert_eq!(from_str("1,list=[]").map(|read: Everything| read.list), Ok(vec![]));
    assert_eq!(from_str("1,2,3"), Ok(vec![1_u8, 2, 3]));
}

#[test]
fn quotes_protect_and_are_doubled() {
    let path = |text: &str| from_str::<Log>(text).map(|log| log.path.to_string_lossy().into_owned());
    assert_eq!(path("path=\"a,b]\",max=1M"), Ok("a,b]".into()));
    assert_eq!(path("path=\"say \"\"hi\"\"\""), Ok("say \"hi\"".into()));
    assert_eq!(path("path=\"\""), Ok(String::new()));
    assert_eq!(path("path=a\"b"), Ok("a\"b".into()));
    assert_eq!(path("path=a=b=\"c"), Ok("a=b=\"c".into()));
    assert_eq!(path("path=a]b[c"), Ok("a]b[c".into()));
    assert_eq!(path("path= a b "), Ok(" a b ".into()));
}

#[test]
fn a_broken_text_is_refused_with_the_way_out() {
    for (text, says) in [
        ("path=", "say path=VALUE"),
        ("path", "`path` needs a value: say path=VALUE"),
        ("=x", "`=x` has no key"),
        (",path=x", "drop it"),
        ("path=x,", "drop it"),
        ("path=x,,max=1M", "drop it"),
        ("path=\"x", "not closed"),
        ("path=\"x\"y", "`y` follows"),
        ("path=[x", "close it"),
        ("path=[x]y", "`y` follows"),
        ("path=x,path=y", "`path` is given twice"),
        ("x,path=y", "`path` is given twice"),
        ("x,maximum=1M", "Unknown key `maximum` (did you mean `max`?): say one of `path`, `max`"),
        ("x,y", "Unknown key `y`: say one of `path`, `max`"),
        ("x,max=12Q", "max: `12Q` is not a size"),
        ("x,max=[1M]", "max: "),
        ("", "`path` is missing"),
    ] {
        let fault = fault::<Log>(text);
        assert!(fault.contains(says), "{text}: {fault}");
    }
    assert!(fault::<Log>(&"[".repeat(1_000_000)).contains("use fewer"));
}

#[test]
fn a_number_out_of_bounds_names_the_bounds() {
    assert_eq!(fault::<u8>("300"), "300 is too large: say a number from 0 to 255");
    assert_eq!(fault::<u64>("-1"), "-1 is too small: say a number from 0 to 18446744073709551615");
    assert_eq!(from_str("18446744073709551615"), Ok(u64::MAX));
    assert_eq!(from_str("-9223372036854775808"), Ok(i64::MIN));
    assert!(fault::<u64>(&"9".repeat(100)).contains("too large"));
    for text in ["0x", "-", "4x", "1.5", "+4", "1_0", "0x-1", "--1", "ff", ""] {
        assert!(from_str::<u64>(text).is_err(), "{text}");
    }
    assert!(fault::<(u8, u8)>("1,2,3").contains("`3` is one too many"));
    assert!(from_str::<(u8, u8)>("1").is_err());
}

proptest! {
    #[test]
    fn no_text_panics(text in "(\\PC|[\\[\\],=\"a1]){0,40}") {
        let _ = from_str::<Everything>(&text);
        let _ = from_str::<Serial>(&text);
        let _ = from_str::<Memory>(&text);
        let _ = from_str::<Vec<Vec<String>>>(&text);
        let _ = from_str::<BTreeMap<String, Size>>(&text);
    }

    #[test]
    fn any_path_can_be_said_in_quotes(path in "\\PC{1,20}") {
        let text = format!("file,path=\"{}\"", path.replace('"', "\"\""));
        prop_assert_eq!(from_str(&text), Ok(Serial::File(Log { path: path.into(), max: None })));
    }
}
