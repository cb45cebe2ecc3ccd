//! What layers come to, and that none leads anywhere else.

use std::io::Write as _;

use super::*;
use crate::layer::Kind;
use crate::testing::{Item, layer_of};

/// The tree of these layers.
fn tree(layers: &[&[Item<'_>]]) -> anyhow::Result<Tree> {
    let mut tree = Tree::default();
    for (number, items) in layers.iter().enumerate() {
        let mut file = tempfile::tempfile()?;
        let bytes = layer_of(items);
        file.write_all(&bytes)?;
        tree.add(number, layer::read(&file, bytes.len() as u64)?)?;
    }
    Ok(tree)
}

fn paths(tree: &Tree) -> Vec<String> {
    tree.files().map(|(path, _)| String::from_utf8(path.to_vec()).unwrap()).collect()
}

fn file(name: &str) -> Item<'_> {
    Item::file(name, b"")
}

#[test]
fn a_whiteout_removes_what_lower_layers_have_and_nothing_of_its_own_layer() {
    let lower = [file("a/x"), file("a/y/z"), file("b/x"), file("b/y"), file("c")];
    // In whichever order: what is added beside a whiteout stays.
    let upper = [file("b/new"), file("b/.wh..wh..opq"), file("a/.wh.y"), file(".wh.c"), file("c"), file(".wh.missing")];
    let tree = tree(&[&lower, &upper]).unwrap();
    assert_eq!(paths(&tree), ["", "a", "a/x", "b", "b/new", "c"]);
    assert_eq!(tree.find(b"c").unwrap().layer, 1);
}

#[test]
fn an_opaque_root_removes_everything_below_and_old_tools_marks_nothing() {
    let upper = [file(".wh..wh..opq"), file(".wh..wh.plnk"), file("new")];
    assert_eq!(paths(&tree(&[&[file("a/x"), file("b")], &upper]).unwrap()), ["", "new"]);
    for name in [".wh.", ".wh..", ".wh...", "a/.wh..."] {
        let error = format!("{:#}", tree(&[&[file("a/x")], &[file(name)]]).unwrap_err());
        assert!(error.contains("removes nothing"), "{name}: {error}");
    }
}

#[test]
fn a_folder_over_a_folder_keeps_what_is_in_it_and_all_else_replaces() {
    let lower = [Item::folder("a").owner(1, 1), file("a/x"), file("b/x"), file("c"), Item::symlink("d", "a")];
    let upper = [Item::folder("a").owner(2, 2).mode(0o700), file("b"), Item::folder("c"), Item::folder("d")];
    let tree = tree(&[&lower, &upper]).unwrap();
    assert_eq!(paths(&tree), ["", "a", "a/x", "b", "c", "d"]);
    let meta = &tree.find(b"a").unwrap().meta;
    assert_eq!((meta.uid, meta.gid, meta.mode), (2, 2, 0o700));
    assert_eq!((&tree.find(b"c").unwrap().kind, &tree.find(b"d").unwrap().kind), (&Kind::Folder, &Kind::Folder));
}

#[test]
fn links_in_a_path_lead_nowhere_but_into_the_tree() {
    let lower = [Item::folder("usr/lib"), Item::symlink("lib", "usr/lib"), Item::symlink("etc", "/../../../real")];
    let upper = [file("lib/new"), file("etc/passwd"), Item::symlink("up", "../../../.."), file("up/top")];
    let tree = tree(&[&lower, &upper]).unwrap();
    assert_eq!(paths(&tree), ["", "etc", "lib", "real", "real/passwd", "top", "up", "usr", "usr/lib", "usr/lib/new"]);
    assert_eq!(tree.find(b"etc/passwd").unwrap(), tree.find(b"real/passwd").unwrap());
}

#[test]
fn links_that_go_round_are_refused() {
    let round = [Item::symlink("a", "b"), Item::symlink("b", "a"), file("a/x")];
    let error = format!("{:#}", tree(&[&round]).unwrap_err());
    assert!(error.contains("the entry a/x") && error.contains("too many symbolic links"), "{error}");
    assert!(tree(&[&round[..2]]).unwrap().find(b"a").is_none());
}

#[test]
fn hard_links_are_one_file_and_lead_nowhere_outside() {
    let lower = [file("a"), Item::link("b", "/a"), Item::symlink("passwd", "/etc/passwd")];
    let tree_of = tree(&[&lower, &[Item::link("c", "b"), Item::link("b", "b"), Item::link("d", "passwd")]]).unwrap();
    let nodes: Vec<_> = tree_of.files().filter(|(path, _)| [&b"a"[..], b"b", b"c"].contains(path)).collect();
    assert!(nodes.len() == 3 && nodes.iter().all(|(_, node)| Rc::ptr_eq(node, nodes[0].1)));
    assert_eq!(tree_of.files().last().unwrap().1.kind, Kind::Symlink(b"/etc/passwd".to_vec()), "a link to the link");
    for target in ["/etc/passwd", "missing", "folder"] {
        let error = format!("{:#}", tree(&[&[Item::folder("folder"), Item::link("x", target)]]).unwrap_err());
        assert!(error.contains("the entry x") && error.contains("which is no file"), "{error}");
    }
}

#[test]
fn nothing_is_below_a_file() {
    let error = format!("{:#}", tree(&[&[file("a"), file("a/b")]]).unwrap_err());
    assert!(error.contains("the entry a/b") && error.contains("below a, which is no folder"), "{error}");
}

#[test]
fn the_working_directory_is_made_where_it_is_missing() {
    let mut tree = tree(&[&[Item::symlink("srv", "data"), file("file")]]).unwrap();
    tree.make_folder(b"/srv/app/").unwrap();
    tree.make_folder(b"/").unwrap();
    assert_eq!(paths(&tree), ["", "data", "data/app", "file", "srv"]);
    assert!(tree.make_folder(b"/file/x").is_err());
}
