//! The front end against processes that do not keep to the protocol. One that does is in `testing`.

use std::io::Write as _;
use std::thread;

use super::testing::{FEATURES, answer, receive};
use super::*;

const SHORT: Duration = Duration::from_millis(50);

/// What opening a connection ends in, whose other end says `words` unasked and then nothing.
fn opened(words: &[u8]) -> io::Error {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(words).unwrap();
    Connection::open(ours, SHORT).err().expect("it is no answer")
}

#[test]
fn one_who_does_not_answer_is_waited_for_in_bounded_time() {
    let start = Instant::now();
    assert_eq!(opened(&[]).kind(), ErrorKind::TimedOut);
    assert_eq!(opened(&answer(1, FEATURES)[..19]).kind(), ErrorKind::TimedOut);
    assert_eq!(opened(&answer(1, FEATURES)).kind(), ErrorKind::TimedOut);
    assert!(start.elapsed() >= 3 * SHORT);
}

#[test]
fn one_who_answers_byte_by_byte_gets_no_more_time() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let slow = thread::spawn(move || {
        for byte in answer(1, FEATURES) {
            thread::sleep(SHORT / 4);
            if theirs.write_all(&[byte]).is_err() {
                return;
            }
        }
    });
    assert_eq!(Connection::open(ours, SHORT).err().unwrap().kind(), ErrorKind::TimedOut);
    slow.join().unwrap();
}

#[test]
fn an_answer_to_something_else_or_of_another_length_is_refused() {
    let mut long = answer(1, FEATURES);
    long[8] = 9;
    let mut question = answer(1, FEATURES);
    question[4] = 1;
    let mut version = answer(1, FEATURES);
    version[4] = 6;
    for words in [answer(2, FEATURES), long, question, version] {
        assert_eq!(opened(&words).kind(), ErrorKind::InvalidData);
    }
    let old = opened(&answer(1, FEATURES & !(1 << 32)));
    assert!(old.to_string().contains("VIRTIO 1"), "{old}");
}

#[test]
fn one_who_hangs_up_is_an_error_at_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let error = Connection::open(ours, Duration::from_secs(100)).err().unwrap();
    assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof), "{error}");
}

#[test]
fn a_refusal_and_a_broken_promise_are_named() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let refuses = thread::spawn(move || {
        while let Some((request, flags, ..)) = receive(&theirs) {
            let result = match request {
                1 => FEATURES,
                15 => u64::MAX,
                2 => 77,
                _ => 0,
            };
            if flags & NEED_REPLY != 0 || matches!(request, 1 | 15) {
                theirs.write_all(&answer(request, result)).unwrap();
            }
        }
    });
    let mut connection = Connection::open(ours, Duration::from_secs(20)).unwrap();
    assert_eq!(connection.features(), 1 << 32 | 1 << 15);
    let memory = virtio::testing::wiring().memory;
    let error = connection.start(&[], &memory, 1 << 32).unwrap_err().to_string();
    assert!(error.contains("refuses request 2 (77)"), "{error}");
    let error = connection.start(&[], &memory, 1 << 32 | 1).unwrap_err().to_string();
    assert!(error.contains("promised") && error.contains("0x1"), "{error}");
    drop(connection);
    refuses.join().unwrap();
}

#[test]
fn memory_that_others_cannot_map_is_named_with_the_cure() {
    let private = memory::MemorySpec { size: kv::Size(64 << 20), ..memory::MemorySpec::default() };
    let error = table(&private.map().unwrap()).unwrap_err().to_string();
    assert!(error.contains("shared"), "{error}");
}
