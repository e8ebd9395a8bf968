# Panel('my-cars')
from .form import Panel as Panel
