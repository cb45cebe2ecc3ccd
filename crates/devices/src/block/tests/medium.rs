//! Drives whose image grows, or is another one, while they live.

use super::*;

#[test]
fn a_file_that_has_grown_is_a_larger_disk_when_asked_for() {
    let folder = folder();
    let path = raw_image(&folder, SIZE);
    let mut block = Block::open(&spec(path.clone())).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(2 * SIZE).unwrap();
    assert_eq!(block.resize(None).unwrap(), 2 * SIZE);
    assert_eq!(block.config()[..8], (2 * SIZE / 512).to_le_bytes());
    let mut guest = start(block);
    assert_eq!(put(&mut guest, OUT, SIZE / 512, &[1; 512]), 0);
}

#[test]
fn the_image_in_the_drive_is_known_again_whatever_it_is_called_and_however_it_comes() {
    let folder = folder();
    let path = raw_image(&folder, SIZE);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let mut block = Block::open(&spec(path.clone())).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let opened = Opened(Arc::new(file.try_clone().unwrap()));
    let x = folder.path().join("x");
    for (size, name, opened) in [(2, &path, None), (3, &link, Some(opened.clone())), (4, &x, Some(opened))] {
        file.set_len(size * SIZE).unwrap();
        block.change(name, opened, None).unwrap();
        assert_eq!((block.capacity, &block.spec().path), (size * SIZE, &path));
    }
    // Another file of the same name is another medium, for who sends it.
    fs::remove_file(&path).unwrap();
    raw_image(&folder, 5 * SIZE);
    block.change(&path, None, None).unwrap();
    assert_eq!(block.capacity, 4 * SIZE);
    let other = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    block.change(&path, Some(Opened(Arc::new(other))), None).unwrap();
    assert_eq!(block.capacity, 5 * SIZE);
}

#[test]
fn an_image_that_was_opened_in_the_wrong_way_is_refused_and_in_the_right_way_is_locked() {
    let (first, second) = (folder(), folder());
    let (old, new) = (raw_image(&first, SIZE), raw_image(&second, SIZE));
    let mut block = Block::open(&spec(old)).unwrap();
    let mut change = |options: &mut OpenOptions| {
        let opened = Opened(Arc::new(options.open(&new).unwrap()));
        block.change(Path::new("label"), Some(opened), None).map_err(|error| format!("{error:#}"))
    };
    assert!(change(OpenOptions::new().read(true)).unwrap_err().contains("not open for writing"));
    assert!(change(OpenOptions::new().write(true)).unwrap_err().contains("not open for reading"));
    assert!(change(OpenOptions::new().read(true).custom_flags(libc::O_PATH)).unwrap_err().contains("not open for"));
    change(OpenOptions::new().read(true).append(true)).unwrap();
    assert!(format!("{:#}", Block::open(&spec(new.clone())).err().unwrap()).contains("locked"));
    // It was opened to append, and is written to where the guest says.
    assert_eq!(put(&mut start(block), OUT, 0, &[1; 512]), 0);
    assert_eq!(fs::read(&new).unwrap()[..512], [1; 512]);
}

#[test]
fn a_medium_of_another_kind_is_refused_and_the_old_one_stays() {
    let folder = folder();
    let path = raw_image(&folder, SIZE);
    let mut block = Block::open(&spec(path.clone())).unwrap();
    let readonly = BlockSpec { readonly: true, ..spec(path) };
    assert!(format!("{:#}", block.change_medium(&readonly, None).unwrap_err()).contains("stay as they were"));
    assert!(block.change_medium(&spec(folder.path().join("none")), None).is_err());
    assert_eq!(get(&mut start(block), IN, 0, 512).1, 0);
}

#[test]
fn a_medium_is_changed_while_the_guest_runs_and_the_guest_is_told() {
    for engine in ENGINES {
        let (first, second) = (folder(), folder());
        let old = raw_image(&first, SIZE);
        let new = raw_image(&second, 2 * SIZE);
        let mut guest = boot(&BlockSpec { engine, ..spec(old.clone()) });
        assert_eq!(put(&mut guest, OUT, 0, &[1; 512]), 0);
        let changed = BlockSpec { engine, ..spec(new.clone()) };
        guest.registers.device.core().control(|block, handler| block.change_medium(&changed, handler)).unwrap();
        let size = guest.wait(None, "announce the medium", |guest| {
            let mut size = [0; 8];
            testing::Registers::read_config(&mut guest.registers, 0, &mut size);
            Some(u64::from_le_bytes(size)).filter(|sectors| *sectors == 2 * SIZE / 512)
        });
        assert_eq!(put(&mut guest, OUT, size - 1, &[2; 512]), 0);
        assert_eq!(fs::read(&old).unwrap()[..512], [1; 512], "{engine:?}");
        assert!(fs::read(&new).unwrap().ends_with(&[2; 512]), "{engine:?}");
        // The old image is free for others.
        Block::open(&spec(old)).unwrap();
    }
}

#[test]
fn a_changed_medium_has_room_for_the_requests_of_all_the_drive_s_queues() {
    for engine in ENGINES {
        let (first, second) = (folder(), folder());
        let mut guest = boot(&BlockSpec { engine, queues: Some(3), ..spec(raw_image(&first, SIZE)) });
        let changed = BlockSpec { engine, ..spec(raw_image(&second, SIZE)) };
        guest.registers.device.core().control(|block, handler| block.change_medium(&changed, handler)).unwrap();
        for queue in 0..3 {
            for at in 0..80 {
                guest.add(queue, &[&header(OUT, at * 8), &[1; 4096]], &[1]);
            }
        }
        for queue in 0..3 {
            guest.kick(queue);
        }
        for queue in 0..3 {
            for _ in 0..80 {
                assert_eq!(guest.collect(queue).data, [0], "{engine:?}");
            }
        }
    }
}
