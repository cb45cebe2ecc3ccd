//! The session with an agent that is the test.

use super::*;

fn shared(window: usize) -> (Arc<Shared>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let state = State { agent: Some(ours), window, ..State::default() };
    let ended = EventFd::new(EFD_NONBLOCK).unwrap();
    (Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), ended }), theirs)
}

/// What comes of an agent that says this, and then nothing more.
fn outcome(answers: &[Answer]) -> anyhow::Result<u8> {
    let (shared, mut agent) = shared(0);
    for answer in answers {
        frame::write_message(&mut agent, answer).unwrap();
    }
    drop(agent);
    let mut ours = shared.lock().agent.take().unwrap();
    shared.pass_output(&mut ours, &mut Output::Streams)
}

#[test]
fn exit_codes_are_those_of_shells_and_container_tools() {
    for (answer, code) in [
        (Answer::Exited { code: 42 }, 42),
        (Answer::Killed { signal: 9 }, 137),
        (Answer::Killed { signal: i32::MAX }, 255),
        (Answer::Killed { signal: i32::MIN }, 128),
    ] {
        assert_eq!(outcome(&[Answer::Started, answer]).unwrap(), code);
    }
    for (kind, code) in [(Trouble::NotFound, 127), (Trouble::NotExecutable, 126), (Trouble::Other, 125)] {
        let error = outcome(&[Answer::NotStarted { kind, message: "no".into() }]).unwrap_err();
        assert_eq!(code, error.downcast::<NotStarted>().unwrap().code);
    }
}

#[test]
fn an_agent_that_goes_or_says_something_else_is_an_error() {
    for answers in [vec![], vec![Answer::Started], vec![Answer::Healthy], vec![Answer::Failed { message: "no".into() }]]
    {
        outcome(&answers).unwrap_err();
    }
}

#[test]
fn a_guest_s_words_do_nothing_to_a_terminal() {
    let error = outcome(&[Answer::Failed { message: "a\x1b[2J\nb".into() }]).unwrap_err().to_string();
    assert!(error.ends_with("a [2J b"), "{error:?}");
}

#[test]
fn input_is_sent_as_the_window_opens_and_no_further() {
    let (shared, mut agent) = shared(4);
    let sender = Arc::clone(&shared);
    let sending = thread::spawn(move || sender.send_input(b"abcdefghij"));
    let read = |agent: &mut UnixStream| frame::read_frame(agent).unwrap().unwrap().payload;
    assert_eq!(read(&mut agent), b"abcd");
    shared.lock().window += 3;
    shared.changed.notify_all();
    assert_eq!(read(&mut agent), b"efg");
    shared.end(Ok(0));
    sending.join().unwrap().unwrap_err();
    drop(shared);
    assert_eq!(frame::read_frame(&mut agent).unwrap(), None);
}

#[test]
fn the_end_of_input_needs_no_room() {
    let (shared, mut agent) = shared(0);
    shared.send_input(b"").unwrap();
    let frame = frame::read_frame(&mut agent).unwrap().unwrap();
    assert_eq!((frame.kind, frame.payload), (Kind::Stdin, Vec::new()));
}

#[test]
fn a_signal_is_not_kept_waiting_by_input_that_nobody_takes() {
    let (shared, mut agent) = shared(0);
    let session = Session { shared: Arc::clone(&shared), start: Mutex::new(None), folder: None };
    assert!(session.signal(15));
    assert_eq!(frame::read_message::<Control>(&mut agent).unwrap(), Control::Signal(15));
    let busy = shared.lock();
    assert!(!session.signal(15));
    drop(busy);
    session.finish();
    assert!(!session.signal(15), "there is nobody any more");
}
