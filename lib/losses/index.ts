export { distillation } from './distillation.js';
