//! Layers over layers, and links that try to lead out.

use super::*;

fn path(text: &str) -> LayerPath {
    LayerPath::parse(text.as_bytes()).unwrap()
}

fn put(tree: &mut Tree, at: &str, kind: Kind) -> Result<(), String> {
    tree.put(&path(at), Node { meta: Meta::default(), kind })
}

fn dir() -> Kind {
    Kind::Directory(BTreeMap::new())
}

fn file() -> Kind {
    Kind::File(Extent::Small { at: 0, size: 0 })
}

fn link(target: &str) -> Kind {
    Kind::Symlink(target.into())
}

/// All paths, in order.
fn list(tree: &Tree) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![(String::new(), ROOT)];
    while let Some((at, id)) = left.pop() {
        let Kind::Directory(children) = &tree.node(id).kind else { continue };
        for (name, entry) in children {
            let path = format!("{at}/{}", String::from_utf8_lossy(name));
            found.push(path.clone());
            left.push((path, entry.node));
        }
    }
    found.sort();
    found
}

#[test]
fn whiteouts_remove_what_earlier_layers_have_whatever_the_order() {
    let mut tree = Tree::default();
    for at in ["a/old/deep", "a/kept", "b/old", "c", "d/old", "e/old"] {
        put(&mut tree, at, file()).unwrap();
    }
    tree.next_layer();
    put(&mut tree, "a/old/new", file()).unwrap();
    tree.opaque(&path("a"));
    tree.whiteout(&path("b"));
    put(&mut tree, "b", file()).unwrap();
    put(&mut tree, "c", file()).unwrap();
    tree.whiteout(&path("c"));
    put(&mut tree, "d/new", file()).unwrap();
    tree.whiteout(&path("d"));
    tree.whiteout(&path("e"));
    tree.whiteout(&path("nowhere/at/all"));
    tree.opaque(&path("c"));
    assert_eq!(list(&tree), ["/a", "/a/old", "/a/old/new", "/b", "/c", "/d", "/d/new"]);
    tree.next_layer();
    tree.opaque(&path(""));
    assert!(list(&tree).is_empty());
}

#[test]
fn links_are_followed_within_the_tree_alone() {
    let mut tree = Tree::default();
    put(&mut tree, "usr/lib", dir()).unwrap();
    put(&mut tree, "lib", link("usr/lib")).unwrap();
    put(&mut tree, "out", link("../../../..//usr/./lib/../lib")).unwrap();
    put(&mut tree, "absolute", link("/usr/lib")).unwrap();
    for at in ["lib/a", "out/b", "absolute/c"] {
        put(&mut tree, at, file()).unwrap();
    }
    put(&mut tree, "dangling", link("etc/host")).unwrap();
    put(&mut tree, "dangling/passwd", file()).unwrap();
    for at in ["usr/lib/a", "usr/lib/b", "usr/lib/c", "etc/host/passwd"] {
        assert!(tree.look(&path(at)).is_some(), "{at}");
    }
    // The last name is never followed: a link is replaced, not what it leads to.
    put(&mut tree, "lib", dir()).unwrap();
    assert!(tree.look(&path("lib/a")).is_none());

    put(&mut tree, "x", link("y")).unwrap();
    put(&mut tree, "y", link("x")).unwrap();
    assert!(put(&mut tree, "x/file", file()).unwrap_err().contains("too many links"));
    assert!(put(&mut tree, "usr/lib/a/b", file()).unwrap_err().contains("in the way"));
    assert!(put(&mut tree, "", file()).is_err());
    tree.whiteout(&path("x/file"));
}

#[test]
fn hard_links_share_a_file_and_nothing_else() {
    let mut tree = Tree::default();
    put(&mut tree, "dir/file", file()).unwrap();
    tree.link(&path("name"), &path("dir/file")).unwrap();
    assert_eq!(tree.look(&path("name")), tree.look(&path("dir/file")));
    assert!(tree.link(&path("other"), &path("dir")).unwrap_err().contains("a directory"));
    assert!(tree.link(&path("other"), &path("missing")).unwrap_err().contains("not there"));
    assert!(tree.link(&path("other"), &path("")).is_err());
    assert!(tree.link(&path(""), &path("name")).is_err());
}

#[test]
fn a_directory_over_a_directory_keeps_what_is_in_it() {
    let mut tree = Tree::default();
    put(&mut tree, "a/b", file()).unwrap();
    tree.next_layer();
    let meta = Meta { mode: 0o700, ..Meta::default() };
    tree.put(&path("a"), Node { meta: meta.clone(), kind: dir() }).unwrap();
    tree.put(&path(""), Node { meta: meta.clone(), kind: dir() }).unwrap();
    assert_eq!(list(&tree), ["/a", "/a/b"]);
    assert_eq!(tree.node(ROOT).meta, meta);
    put(&mut tree, "a", file()).unwrap();
    assert_eq!(list(&tree), ["/a"]);
}
