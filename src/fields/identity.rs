//! The identity of an instance: its id, its run and its parent, owned or borrowed.

/// An instance, with its run and its parent as far as they are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) instance_id: Box<str>,
    pub(crate) run_id: Option<Box<str>>,
    pub(crate) parent_instance_id: Option<Box<str>>,
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
