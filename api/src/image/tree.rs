//! A file system as a tree in memory, built up layer by layer. File contents are elsewhere; the tree has where.
//!
//! Paths are resolved within the tree alone, the way a process that is chrooted to it would see them, so that
//! no link in an image leads anywhere but into the same image.

use std::collections::BTreeMap;

use super::erofs::Extent;
use super::layer::LayerPath;

/// Links followed while one path is resolved; as in Linux.
const MOST_LINKS: usize = 40;

/// Index into the tree's nodes.
pub type NodeId = usize;
pub const ROOT: NodeId = 0;

/// One inode.
#[derive(Clone, Debug)]
pub struct Node {
    pub meta: Meta,
    pub kind: Kind,
}

/// What inodes of every kind have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, with those for set-user-ID, set-group-ID and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    /// Full names, such as `security.capability`, and values.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Debug)]
pub enum Kind {
    Directory(BTreeMap<Vec<u8>, Entry>),
    File(Extent),
    Symlink(Vec<u8>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// One name in a directory.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub node: NodeId,
    /// Which layer put it there, or put something below it, last.
    layer: u32,
}

#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    /// Counts the layers, so that a whiteout removes only what earlier ones put.
    layer: u32,
}

impl Default for Tree {
    fn default() -> Self {
        Tree { nodes: vec![directory()], layer: 0 }
    }
}

fn directory() -> Node {
    Node { meta: Meta { mode: 0o755, ..Meta::default() }, kind: Kind::Directory(BTreeMap::new()) }
}

impl Tree {
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id]
    }

    /// How many nodes there are, those included that nothing leads to any more.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// What follows is of the next layer.
    pub fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// Puts a node at a path, in place of what is there; missing directories are made. A directory put over a
    /// directory keeps what is in it.
    ///
    /// # Errors
    ///
    /// What is in the way: a sentence.
    pub fn put(&mut self, path: &LayerPath, node: Node) -> Result<(), String> {
        let Some((parent, name)) = self.parent(path)? else {
            // The root: its entry carries only what is said about it.
            return match node.kind {
                Kind::Directory(_) => {
                    self.nodes[ROOT].meta = node.meta;
                    Ok(())
                }
                _ => Err("the root of the file system is not a directory".to_owned()),
            };
        };
        if matches!(node.kind, Kind::Directory(_))
            && let Some(there) = self.child(parent, name)
            && matches!(self.nodes[there].kind, Kind::Directory(_))
        {
            self.nodes[there].meta = node.meta;
            self.set(parent, name, there);
            return Ok(());
        }
        let id = self.add(node);
        self.set(parent, name, id);
        Ok(())
    }

    /// Makes `path` another name of the file at `target`.
    ///
    /// # Errors
    ///
    /// There is no such file, or something is in the way.
    pub fn link(&mut self, path: &LayerPath, target: &LayerPath) -> Result<(), String> {
        let missing = || format!("it is a hard link to {target}, which is not there");
        let (from, name) = self.parent(target)?.ok_or_else(missing)?;
        let node = self.child(from, name).ok_or_else(missing)?;
        if matches!(self.nodes[node].kind, Kind::Directory(_)) {
            return Err(format!("it is a hard link to {target}, a directory"));
        }
        let Some((parent, name)) = self.parent(path)? else {
            return Err("the root of the file system is not a directory".to_owned());
        };
        self.set(parent, name, node);
        Ok(())
    }

    /// Removes what earlier layers have at a path; nothing, if there is nothing.
    pub fn whiteout(&mut self, path: &LayerPath) {
        let Some((parent, name)) = self.find_parent(path) else { return };
        let Some(entry) = self.entry(parent, name) else { return };
        match entry.layer < self.layer {
            true => drop(self.children(parent).map(|children| children.remove(name))),
            // This layer put it there anew, maybe as the same directory: what that had is removed.
            false => self.prune(entry.node),
        }
    }

    /// Removes what earlier layers have in the directory at a path.
    pub fn opaque(&mut self, path: &LayerPath) {
        let found = match path.split() {
            None => Some(ROOT),
            Some(_) => self.find_parent(path).and_then(|(parent, name)| self.child(parent, name)),
        };
        if let Some(id) = found {
            self.prune(id);
        }
    }

    fn prune(&mut self, id: NodeId) {
        let layer = self.layer;
        let mut left = vec![id];
        while let Some(id) = left.pop() {
            if let Some(children) = self.children(id) {
                children.retain(|_, entry| entry.layer >= layer);
                left.extend(children.values().map(|entry| entry.node));
            }
        }
    }

    /// What is at a path, links followed except for the last name.
    pub fn look(&self, path: &LayerPath) -> Option<NodeId> {
        match path.split() {
            None => Some(ROOT),
            Some(_) => self.find_parent(path).and_then(|(parent, name)| self.child(parent, name)),
        }
    }

    fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn children(&mut self, id: NodeId) -> Option<&mut BTreeMap<Vec<u8>, Entry>> {
        match &mut self.nodes[id].kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn entry(&self, parent: NodeId, name: &[u8]) -> Option<Entry> {
        match &self.nodes[parent].kind {
            Kind::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.entry(parent, name).map(|entry| entry.node)
    }

    fn set(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        let layer = self.layer;
        if let Some(children) = self.children(parent) {
            children.insert(name.to_owned(), Entry { node, layer });
        }
    }

    /// The directory a path is in, which is made if need be, and the last name. None for the root.
    fn parent<'p>(&mut self, path: &'p LayerPath) -> Result<Option<(NodeId, &'p [u8])>, String> {
        let Some((names, name)) = path.split() else { return Ok(None) };
        let parent = self.walk(names, true)?;
        parent.map(|parent| Some((parent, name))).ok_or_else(|| "its directory is not there".to_owned())
    }

    fn find_parent<'p>(&self, path: &'p LayerPath) -> Option<(NodeId, &'p [u8])> {
        let (names, name) = path.split()?;
        Walk::new(names).go(self).ok().flatten().map(|stop| stop.at).zip(Some(name))
    }

    /// Follows directories and links from the root; `make` makes what is missing, and notes that this layer has
    /// something there.
    fn walk(&mut self, names: &[Vec<u8>], make: bool) -> Result<Option<NodeId>, String> {
        let mut walk = Walk::new(names);
        loop {
            match walk.step(self)? {
                Step::There(at) => return Ok(Some(at)),
                Step::On { parent, name, node } if make => self.set(parent, &name, node),
                Step::On { .. } => {}
                Step::Missing { parent, name } if make => {
                    let node = self.add(directory());
                    self.set(parent, &name, node);
                    walk.enter(node);
                }
                Step::Missing { .. } => return Ok(None),
            }
        }
    }
}

/// A path on its way from the root to where it leads.
struct Walk {
    /// Directories gone through, for `..` in links.
    trail: Vec<NodeId>,
    /// Names still to come, the next one last.
    left: Vec<Vec<u8>>,
    links: usize,
}

enum Step {
    There(NodeId),
    /// Went on through a name.
    On {
        parent: NodeId,
        name: Vec<u8>,
        node: NodeId,
    },
    Missing {
        parent: NodeId,
        name: Vec<u8>,
    },
}

struct Stop {
    at: NodeId,
}

impl Walk {
    fn new(names: &[Vec<u8>]) -> Self {
        Walk { trail: vec![ROOT], left: names.iter().rev().cloned().collect(), links: 0 }
    }

    fn at(&self) -> NodeId {
        self.trail.last().copied().unwrap_or(ROOT)
    }

    fn enter(&mut self, node: NodeId) {
        self.trail.push(node);
    }

    fn go(mut self, tree: &Tree) -> Result<Option<Stop>, String> {
        loop {
            match self.step(tree)? {
                Step::There(at) => return Ok(Some(Stop { at })),
                Step::On { .. } => {}
                Step::Missing { .. } => return Ok(None),
            }
        }
    }

    fn step(&mut self, tree: &Tree) -> Result<Step, String> {
        loop {
            let Some(name) = self.left.pop() else { return Ok(Step::There(self.at())) };
            if name == b".." {
                // Of a link; at the root it stays there, as in a chroot.
                if self.trail.len() > 1 {
                    self.trail.pop();
                }
                continue;
            }
            let parent = self.at();
            let Some(node) = tree.child(parent, &name) else { return Ok(Step::Missing { parent, name }) };
            match &tree.node(node).kind {
                Kind::Directory(_) => {
                    self.enter(node);
                    return Ok(Step::On { parent, name, node });
                }
                Kind::Symlink(target) => {
                    self.links += 1;
                    if self.links > MOST_LINKS {
                        return Err("too many links lead to it".to_owned());
                    }
                    if target.first() == Some(&b'/') {
                        self.trail.truncate(1);
                    }
                    let names = target.split(|byte| *byte == b'/').rev();
                    self.left.extend(names.filter(|name| !matches!(*name, b"" | b".")).map(<[u8]>::to_vec));
                }
                _ => return Err(format!("{} is in the way", String::from_utf8_lossy(&name))),
            }
        }
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
