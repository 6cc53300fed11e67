//! The identity of an instance: its id, its run and its parent, owned or borrowed, and the form of an engine's ids.

/// An instance, with its run and its parent as far as they are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) instance_id: Box<str>,
    pub(crate) run_id: Option<Box<str>>,
    pub(crate) parent_instance_id: Option<Box<str>>,
}

/// The form of an engine's ids that repeat elsewhere: `prefix:queue:id`, or `prefix:id` where no queue is known.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct IdForm {
    pub(super) prefix: &'static str,
    /// The field of the same span that names the queue.
    pub(super) queue: Option<&'static str>,
}

impl IdForm {
    pub(super) fn apply(&self, queue: Option<&str>, id: &str) -> String {
        let prefix = self.prefix;
        match queue.filter(|queue| !queue.is_empty()) {
            Some(queue) => format!("{prefix}:{queue}:{id}"),
            None => format!("{prefix}:{id}"),
        }
    }
}

/// The ids that a span was given so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ids {
    pub(super) instance_id: Option<Box<str>>,
    /// The rank of the field that named the instance; a lower one counts more.
    pub(super) rank: u16,
    pub(super) run_id: Option<Box<str>>,
    pub(super) parent_instance_id: Option<Box<str>>,
    /// The span only looks at the instance that it names.
    pub(crate) observing: bool,
}

impl Ids {
    /// Adds what was given later.
    pub(crate) fn add(&mut self, later: Self) {
        if later.instance_id.is_some() && (self.instance_id.is_none() || later.rank <= self.rank) {
            (self.instance_id, self.rank) = (later.instance_id, later.rank);
        }
        self.run_id = later.run_id.or(self.run_id.take());
        self.parent_instance_id = later.parent_instance_id.or(self.parent_instance_id.take());
    }

    /// Returns the identity, if an instance is named.
    pub(crate) fn identity(self) -> Option<Identity> {
        Some(Identity {
            instance_id: self.instance_id?,
            run_id: self.run_id,
            parent_instance_id: self.parent_instance_id,
        })
    }
}

/// An [`Identity`] of borrowed strings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names<'a> {
    pub(crate) instance_id: &'a str,
    pub(crate) run_id: Option<&'a str>,
    pub(crate) parent_instance_id: Option<&'a str>,
}

impl<'a> Names<'a> {
    pub(crate) fn from_id(instance_id: &'a str) -> Self {
        Self {
            instance_id,
            run_id: None,
            parent_instance_id: None,
        }
    }

    /// Out of line: most spans without a backend keep none.
    #[inline(never)]
    pub(crate) fn to_boxed_identity(self) -> Box<Identity> {
        Box::new(self.to_identity())
    }

    pub(crate) fn to_identity(self) -> Identity {
        Identity {
            instance_id: self.instance_id.into(),
            run_id: self.run_id.map(Box::from),
            parent_instance_id: self.parent_instance_id.map(Box::from),
        }
    }
}

impl Identity {
    pub(crate) fn names(&self) -> Names<'_> {
        Names {
            instance_id: &self.instance_id,
            run_id: self.run_id.as_deref(),
            parent_instance_id: self.parent_instance_id.as_deref(),
        }
    }
}
