"""Calculators that have a torch form, and how each is read and written."""

from mdgraft_ase.forms.form import AbstractForm as AbstractForm
from mdgraft_ase.forms.table import form_of as form_of
