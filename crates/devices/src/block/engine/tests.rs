//! Every engine on its own: what goes in comes out, once, and nothing outlives it.

use super::*;
use crate::block::job::Op;
use std::fs;
use tempfile::TempDir;

const ENGINES: [EngineSpec; 3] = [EngineSpec::Inline, EngineSpec::IoUring, EngineSpec::Threads];

fn spec(folder: &TempDir, engine: EngineSpec) -> BlockSpec {
    let path = folder.path().join("disk");
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    BlockSpec { path, engine, ..BlockSpec::default() }
}

fn job(op: Op, offset: u64, memory: &mut [u8]) -> Job {
    let mut job = Job::with_capacity(1);
    job.set(op, offset, memory.len() as u64);
    job.extend([libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() }]);
    job
}

#[test]
fn every_job_comes_back_once_with_its_tag_and_its_result() {
    for asked in ENGINES {
        let folder = TempDir::new().unwrap();
        let spec = spec(&folder, asked);
        let image = Arc::new(Image::open(&spec).unwrap());
        let mut engine = Engine::new(&spec, &image, 256).unwrap();
        let mut memory = vec![[0u8; 512]; 256];
        let mut back = vec![0; 256];
        for (tag, memory) in (0..).zip(&mut memory) {
            let done = engine.start(tag, job(Op::Read, u64::from(tag) * 512, memory));
            back[tag as usize] += usize::from(done.is_some());
        }
        engine.submit();
        while back.iter().sum::<usize>() < 256 {
            engine.wait();
            while let Some(done) = engine.finished() {
                assert_eq!(done.result.unwrap(), 512);
                back[done.tag as usize] += 1;
            }
        }
        assert!(back.iter().all(|count| *count == 1) && engine.finished().is_none());
        assert!(memory.iter().flatten().all(|byte| *byte == 7), "{asked:?}");
    }
}

#[test]
fn an_engine_that_goes_waits_for_what_it_has() {
    for asked in ENGINES {
        let folder = TempDir::new().unwrap();
        let spec = spec(&folder, asked);
        let image = Arc::new(Image::open(&spec).unwrap());
        let mut memory = vec![9; 1 << 20];
        let mut engine = Engine::new(&spec, &image, 256).unwrap();
        drop(engine.start(0, job(Op::Write, 0, &mut memory)));
        engine.submit();
        drop(engine);
        assert_eq!(fs::read(&spec.path).unwrap(), memory, "{asked:?}");
    }
}
