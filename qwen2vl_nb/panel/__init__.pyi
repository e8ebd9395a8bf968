from .form import Panel as Panel
